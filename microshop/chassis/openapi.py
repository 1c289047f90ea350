"""What a process publishes about its routes: an OpenAPI document (https://spec.openapis.org/oas).

Programs make clients, tests and web pages from it. Most of it follows from what is in use anyway:
the paths and methods from a handler's `routes`, and what a body may contain from the fields that
validate it. The rest is in a table with an entry for each route:

    routes = {"/things/{id}": {"PUT": replace_thing}}
    operations = {"PUT /things/{id}": Operation("replaceThing", {200: "Thing"}, FIELDS)}
    schemas = {"Thing": resource({"id": ID, **FIELDS})}

describe() turns a route and its entry into a part of the document. Only features of OpenAPI 3.0 are
used here, so older programs can read the document as well. (The gateway adds one of 3.1, `null`.)

Law: nothing here sees a request. The document depends only on tables.
"""
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from microshop.chassis.answer import TAGGED
from microshop.chassis.content import AFTER, ID, LIMIT, MAX_PAGE, PAGE, FieldTable, Integer, Text
from microshop.chassis.errors import PHRASES

INFO = {
    "version": "1.0",  # of the API; the first number changes if clients have to change
    "description": "Errors are problem documents (RFC 9457). HEAD works wherever GET does, and "
                   "OPTIONS everywhere. Unknown parameters of a query are ignored."}
JSON, PROBLEM_JSON = "application/json", "application/problem+json"
SQLITE = "application/vnd.sqlite3"  # as registered with IANA

# The statuses of errors, except those that a client never gets if it uses an HTTP library and this
# document: 405, 417, 501, 505.
ERRORS = (400, 401, 403, 404, 408, 409, 411, 412, 413, 414, 415, 422, 429, 431, 500, 502, 503, 504,
          507)
OF_ALL = {400, 408, 414, 431, 500, 503}  # any operation may answer with these
OF_WRITES = {403, 507}
OF_BODIES = {411, 413, 415, 422}
OF_FORWARDING = {429, 502, 503, 504}


class Operation(NamedTuple):
    """What is published about a route, besides what follows from its method, path and fields.

    `name` is its operationId. `answers` has what the body holds (see schema_of) for each status, or
    None for no body. `fields` are those of the request's body; `errors` and `parameters` are
    additional.
    """

    name: str
    answers: Mapping[int, Any]
    fields: FieldTable | None = None
    errors: Collection[int] = ()
    parameters: Collection[dict] = ()
    summary: str = ""
    media_type: str = JSON

    def is_page(self) -> bool:
        """Return whether it answers with a page of a collection (see Handler.answer_page)."""
        return isinstance(self.answers.get(200), list)


def without_empty(members: dict) -> dict:
    """Leave out optional members that are empty."""
    return {name: member for name, member in members.items() if member}


# --- schemas

def resource(fields: Mapping[str, Any], optional: Collection[str] = ()) -> dict:
    """Return the schema of an object: each of its `fields` is a Field, or a schema already.

    Members may be added later: clients should ignore those that they do not know.
    """
    properties = {name: field.schema() if isinstance(field, Integer | Text) else field
                  for name, field in fields.items()}
    required = [name for name in fields if name not in optional]
    return without_empty({"type": "object", "properties": properties, "required": required})


def schema_of_body(fields: FieldTable) -> dict:
    """Return the schema of the objects that content.validate() accepts."""
    optional = [name for name, field in fields.items() if field.default is not None]
    return {**resource(fields, optional), "additionalProperties": False}


def schema_of(content: Any) -> dict:
    """Return the schema of a body: the one with this name, or of a [list of those], or itself."""
    if isinstance(content, list):
        return {"type": "array", "items": schema_of(content[0])}
    return {"$ref": f"#/components/schemas/{content}"} if isinstance(content, str) else content


STRING, OBJECT = {"type": "string"}, {"type": "object"}
BINARY = {**STRING, "format": "binary"}
PROBLEM = resource({  # see errors.ServiceError
    "type": STRING, "title": STRING, "status": {"type": "integer"}, "detail": STRING,
    "requestId": STRING, "service": STRING, "errors": schema_of([resource(
        {"field": STRING, "detail": STRING})])}, optional=["service", "errors"])
HEALTH = resource({"status": STRING, "service": STRING})
OWN_SCHEMAS = {"Problem": PROBLEM, "Health": HEALTH}


# --- parameters and headers

def parameter(place: str, name: str, schema: dict, description: str) -> dict:
    """Return a parameter in this place: "path", "query" or "header". Arrays are comma-separated."""
    form = {"style": "form", "explode": False} if schema["type"] == "array" else {}
    return {"name": name, "in": place, "required": place == "path", "schema": schema, **form,
            "description": description}


ITEM = parameter("path", "id", ID.schema(), "the id of the item")
PAGING = [
    parameter("query", "limit", {**LIMIT.schema(), "default": PAGE}, "how many rows at most"),
    parameter("query", "after", AFTER.schema(), "only rows with a greater id: see Link"),
    parameter("query", "ids", {**schema_of([ID.schema()]), "minItems": 1, "maxItems": MAX_PAGE},
              "only rows with these ids")]
IF_MATCH = parameter("header", "If-Match", STRING, "an ETag; 412 if the item has changed")
IF_NONE_MATCH = parameter("header", "If-None-Match", STRING, "an ETag; 304 if it is the same")
HEADERS = {
    "ETag": {"schema": STRING, "description": "a fingerprint of the content", "required": True},
    "Location": {"schema": STRING, "description": "the path of the item", "required": True},
    "Link": {"schema": STRING, "description": "leads to the next page, if there is one"},
    "Retry-After": {"schema": {"type": "integer"}, "description": "seconds to wait"}}


# --- operations

OWN_OPERATIONS = {  # of every process, and of those that own data
    "GET /health": Operation("getHealth", {200: "Health", 503: "Health"}),
    "GET /health/live": Operation("getLiveness", {200: "Health"}),
    "GET /openapi.json": Operation("getApi", {200: OBJECT}),
    "GET /metrics": Operation("getMetrics", {200: STRING}, errors=[403], media_type="text/plain",
                              summary="Counters, in the text format of Prometheus"),
    "GET /traces": Operation("getTraces", {200: schema_of([OBJECT])}, errors=[403],
                             summary="The spans of recent requests, as Zipkin reads them"),
    "GET /database": Operation("getDatabase", {200: BINARY}, errors=[507], media_type=SQLITE,
                               summary="A copy of the database as it is now, for the audit"),
}
ERROR = Operation("", {})  # stands for any operation that answers with an error


def make_document(title: str, tag: str, routes: Mapping[str, Collection[str]],
                  operations: Mapping[str, Operation], schemas: Mapping[str, dict]) -> dict:
    """Return the document of a process; its operations are tagged, so that tools can group them.

    `routes` has the methods of each path. A route that has no Operation is not published.
    """
    known, paths = {**OWN_OPERATIONS, **operations}, {}
    for path, methods in routes.items():
        paths[path] = {
            method.lower(): {"tags": [tag], **describe(method, path, methods, operation)}
            for method in methods if (operation := known.get(f"{method} {path}"))}
    responses = {component(status): respond("", status, ERROR) for status in ERRORS}
    return {"openapi": "3.1.0", "info": {"title": title, **INFO},
            "paths": without_empty(paths),
            "components": {"schemas": {**OWN_SCHEMAS, **schemas}, "responses": responses}}


def describe(method: str, path: str, methods: Collection[str], operation: Operation) -> dict:
    """Return what is published about one of the methods of a path (an Operation Object)."""
    parameters, errors = [*operation.parameters], OF_ALL.union(operation.errors)
    statuses, request = {*operation.answers}, {}
    if "{id}" in path:
        parameters.append(ITEM)
        errors |= {404}
    if operation.is_page():
        parameters += PAGING
    if method == "GET" and operation.media_type == JSON:  # see answer.represent()
        parameters.append(IF_NONE_MATCH)
        statuses |= {304}
    if method != "GET":
        errors |= OF_WRITES
    if method in ("PUT", "DELETE") and "GET" in methods:  # see Handler.changing()
        parameters.append(IF_MATCH)
        errors |= {412}
    if operation.fields is not None:
        errors |= OF_BODIES
        schema = schema_of_body(operation.fields)
        request = {"required": True, "content": {JSON: {"schema": schema}}}
    responses = {str(status): respond(method, status, operation) for status in sorted(statuses)}
    return without_empty({
        "operationId": operation.name, "summary": operation.summary, "parameters": parameters,
        "requestBody": request, "responses": responses | refer_to(errors - statuses)})


def respond(method: str, status: int, operation: Operation) -> dict:
    """Return what is published about one status of an operation (a Response Object)."""
    content = {PROBLEM_JSON: {"schema": schema_of("Problem")}} if status >= 400 else {}
    if answer := operation.answers.get(status):
        content = {operation.media_type: {"schema": schema_of(answer)}, **content}
    is_tagged = (method, status) in TAGGED | {("GET", 304)} and operation.media_type == JSON
    sent = {
        "ETag": is_tagged,
        "Link": status == 200 and operation.is_page(),
        "Location": status in (201, 202) and method == "POST",
        "Retry-After": status in (202, 429, 503)}
    headers = {name: header for name, header in HEADERS.items() if sent[name]}
    return without_empty(
        {"description": PHRASES[status], "headers": headers, "content": content})


def refer_to(errors: Iterable[int]) -> dict:
    """Return a reference, for each status, to what all operations answer with it."""
    return {str(status): {"$ref": f"#/components/responses/{component(status)}"}
            for status in sorted(errors)}


def component(status: int) -> str:
    """Return the name under which components have the answer to an error, like NotFound."""
    return PHRASES[status].replace(" ", "")


# --- the document of a gateway

BEARER = {"type": "http", "scheme": "bearer",
          "description": "what writes need, unless the gateway was started without a token"}


def add_service(document: dict, name: str, published: dict, security: list[dict]) -> None:
    """Add what a service publishes about the paths below its name, which are those we forward.

    `security` is what writes need (a list of Security Requirement Objects).
    """
    for path, operations in published["paths"].items():
        if path.split("/")[1] == name:
            document["paths"][path] = operations
            for method, operation in operations.items():
                operation["responses"] |= refer_to(OF_FORWARDING)
                if method != "get":
                    operation["responses"] |= refer_to([401])
                    operation["security"] = security
    components = document["components"]
    components["schemas"] = {**published["components"]["schemas"], **components["schemas"]}
