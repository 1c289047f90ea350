"""The *microservice chassis*: what all processes of the shop share, and nothing of what it sells.

A process
    server       Service: the life of a process: listen, drain, close
    listener     how connections are admitted, each to a thread of its own
    handler      Handler: the requests of one connection: route, answer, errors
    answer       an answer as the bytes of a response
    admission    which requests are admitted: rate limit and bearer token
    database     one SQLite file per service (*database per service*)
    config       settings from flags and the environment (*externalized configuration*)
    access_log   a line for each request, with its *correlation id*

Calls from one process to another
    client       calls to other services, and what may be retried
    connections  kept-alive connections for urllib
    resilience   circuit breaker, bulkhead and retry budget

Messages, at both ends
    wire         HTTP/1.1 as bytes: read strictly, written safely
    content      JSON, queries, validated fields, pages of a collection
    errors       exceptions that carry an HTTP status

Above the processes
    supervisor   child processes: when to start them again, and when to give up

Law: nothing here imports a service, or has a word for anything that one sells.
"""
