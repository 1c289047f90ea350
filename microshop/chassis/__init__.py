"""The microservice chassis: what every process of the shop shares, and nothing of what it sells.

    wire        HTTP/1.1 as bytes: read strictly, written safely; used by both ends
    server      Service and Handler: routes, answers, errors, life and death of a process
    client      calls to other services through urllib, on kept-alive connections
    policies    breaker, retry budget, rate limit, token: when to say no
    database    one SQLite file per service
    content     what messages carry: JSON, queries, pages of a collection
    errors      exceptions that carry an HTTP status
    config      flags over environment over defaults
    access_log  a line per request, at little cost

Law: nothing here imports a service or knows the word for anything that one sells.
"""
