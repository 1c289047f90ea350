"""The *microservice chassis*: the code that all processes share; it knows nothing of the shop.

A process
    server       Service: the life of a process: listen, drain, close
    listener     how connections are admitted, served and closed
    turns        which request is answered next, and by which thread
    handler      Handler: the requests of one connection: route, answer, errors
    answer       an answer as the bytes of a response
    openapi      what is published about the routes: an OpenAPI document
    admission    which requests are admitted: rate limit and bearer token
    database     one SQLite file per service (*database per service*)
    data_folder  the folder of those files: one shop at a time
    config       settings from flags and the environment (*externalized configuration*)
    surroundings what a process inherits and repairs: standard streams, signals, limits
    access_log   a line for each request, with its *correlation id*

What a process tells of its work
    telemetry    counts requests and calls, and keeps the last, slowest and failed ones
    tracing      *distributed tracing*: requests and calls as spans of a trace
    metrics      counts and durations in the text format of Prometheus

Calls from one process to another
    client       calls to other services, and what may be retried
    connections  kept-alive connections for urllib
    resolver     from the name of a host to its addresses, in time
    resilience   circuit breaker, bulkhead and retry budget

Messages, at both ends
    wire         HTTP/1.1 as bytes: read strictly, written safely
    content      JSON, queries, validated fields, pages of a collection
    errors       exceptions that carry an HTTP status

Above the processes
    supervisor   a group of child processes: start, watch, replace and stop them
    child        one child: its processes, and when to restart it or give it up (restart policy)
    console      what a person sees: the output of all processes

Words: a handler returns an *Answer* to its client; a service that we call returns a *Reply*; a
*head* is the first line of a message together with its header fields.

Law: nothing here imports a service or mentions anything that the shop sells.
"""
