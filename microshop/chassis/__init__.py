"""The microservice chassis: what every process of the shop shares, and nothing of what it sells.

    wire      HTTP/1.1 as bytes: read strictly, written safely; used by both ends
    server    Service and Handler: routes, JSON, errors, life and death of a process
    client    calls to other services through urllib, on kept-alive connections
    database  one SQLite file per service
    errors    exceptions that carry an HTTP status
    config    flags over environment over defaults

Law: nothing here imports a service or knows the word for anything that one sells.
"""
