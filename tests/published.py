"""Published documents: a strict little checker of OpenAPI, and of values against its schemas.

It knows only the part of OpenAPI that microshop uses, and finds fault with all else. So whatever
passes here is valid in version 3.1 and, apart from the type null, in version 3.0.
"""
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tests.helpers import Answered

# The members that each kind of object may have; those that it must have are in capital letters.
MEMBERS = {
    "document": "OPENAPI INFO PATHS COMPONENTS",
    "info": "TITLE VERSION description",
    "components": "SCHEMAS RESPONSES securityschemes",
    "operation": "OPERATIONID TAGS RESPONSES summary parameters requestbody security",
    "parameter": "NAME IN REQUIRED SCHEMA DESCRIPTION style explode",
    "body": "REQUIRED CONTENT",
    "response": "DESCRIPTION headers content",
    "header": "DESCRIPTION SCHEMA required",
    "reference": "$REF",
    "object": "TYPE properties required additionalproperties",
    "array": "TYPE ITEMS minitems maxitems",
    "string": "TYPE format enum minlength maxlength pattern",
    "integer": "TYPE format minimum maximum default",
    "null": "TYPE",
    "oneOf": "ONEOF"}
TYPES: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "integer": int, "null": type(None)}


def operations_of(document: dict) -> Iterator[tuple[str, str, dict]]:
    """Yield the method, the path and the description of each operation."""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            yield method.upper(), path, operation


def resolve(document: dict, value: dict) -> dict:
    """Return what an object refers to, or the object itself. Raises KeyError."""
    if "$ref" in value:
        for name in value["$ref"].removeprefix("#/").split("/"):
            document = document[name]
        return document
    return value


# --- whether a document is valid

def find_faults(document: dict) -> Iterator[str]:
    """Yield a sentence for each thing that is wrong with a document."""
    yield from find_unknown("document", "the document", document)
    yield from find_unknown("info", "info", document["info"])
    yield from find_unknown("components", "components", document["components"])
    if document["openapi"] != "3.1.0":
        yield f"the version is {document['openapi']}"
    for reference in find_references(document):
        try:
            resolve(document, {"$ref": reference})
        except KeyError:
            yield f"nothing is at {reference}"
    for name, schema in document["components"]["schemas"].items():
        yield from find_schema_faults(name, schema)
    for name, response in document["components"]["responses"].items():
        yield from find_response_faults(name, response)
    names = Counter(operation["operationId"] for _, _, operation in operations_of(document))
    yield from (f"{count} operations are named {name}" for name, count in names.items()
                if count > 1)
    for method, path, operation in operations_of(document):
        yield from find_operation_faults(f"{method} {path}", path, operation, document)


def find_references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for member in value.values():
            yield from find_references(member)
    elif isinstance(value, list):
        for item in value:
            yield from find_references(item)


def find_unknown(kind: str, where: str, value: dict) -> Iterator[str]:
    """Yield a sentence for each member that an object of this kind must not have, or lacks."""
    known = MEMBERS[kind].split()
    required = {name.lower() for name in known if name.upper() == name}
    found = {name.lower() for name in value}
    yield from (f"{where}: {name} is missing" for name in required - found)
    yield from (f"{where}: {name} is not a member of this {kind}"
                for name in found - {name.lower() for name in known})
    yield from (f"{where}: {name} is empty" for name, member in value.items()
                if member in ("", [], {}) and name not in ("schema", "security"))


def find_operation_faults(where: str, path: str, operation: dict, document: dict) -> Iterator[str]:
    yield from find_unknown("operation", where, operation)
    if not re.fullmatch("[a-z]+([A-Z][a-z]+)*", operation["operationId"]):
        yield f"{where}: {operation['operationId']} is not a good name for a method of a client"
    places = Counter()
    for parameter in operation.get("parameters", []):
        yield from find_unknown("parameter", where, parameter)
        yield from find_schema_faults(f"{where}: {parameter['name']}", parameter["schema"])
        if parameter["in"] not in ("path", "query", "header"):
            yield f"{where}: a parameter in {parameter['in']}"
        if parameter["required"] != (parameter["in"] == "path"):
            yield f"{where}: the parameter {parameter['name']} is not required, but its path is"
        places[parameter["in"], parameter["name"].lower()] += 1
    yield from (f"{where}: {place} is there twice" for place in places if places[place] > 1)
    declared = {name for place, name in places if place == "path"}
    if declared != set(re.findall(r"\{(\w+)\}", path)):
        yield f"{where}: declares the path parameters {declared}"
    if "requestBody" in operation:
        yield from find_unknown("body", f"{where}, body", operation["requestBody"])
        yield from find_content_faults(f"{where}, body", operation["requestBody"]["content"])
        if operation["requestBody"]["content"].keys() != {"application/json"}:
            yield f"{where}: takes a body that is not JSON"
    for status, response in operation["responses"].items():
        if not re.fullmatch("[2-5][0-9][0-9]", status):
            yield f"{where}: {status} is not a status"
        yield from find_response_faults(f"{where}, {status}", response)
        contents = resolve(document, response).get("content", {})
        if status >= "400" and "application/problem+json" not in contents:
            yield f"{where}: {status} is not a problem document"
    for requirement in operation.get("security", []):
        for name in requirement:
            if name not in document["components"].get("securitySchemes", {}):
                yield f"{where}: there is no security scheme {name}"


def find_response_faults(where: str, response: dict) -> Iterator[str]:
    if "$ref" in response:
        yield from find_unknown("reference", where, response)
        return
    yield from find_unknown("response", where, response)
    for name, header in response.get("headers", {}).items():
        yield from find_unknown("header", f"{where}, {name}", header)
        yield from find_schema_faults(f"{where}, {name}", header["schema"])
    yield from find_content_faults(where, response.get("content", {}))


def find_content_faults(where: str, content: dict) -> Iterator[str]:
    for media_type, described in content.items():
        if not re.fullmatch("[a-z]+/[a-z0-9.+]+", media_type) or described.keys() != {"schema"}:
            yield f"{where}: {media_type} {described}"
        yield from find_schema_faults(where, described["schema"])


def find_schema_faults(where: str, schema: dict) -> Iterator[str]:
    kind = "reference" if "$ref" in schema else "oneOf" if "oneOf" in schema else schema["type"]
    yield from find_unknown(kind, where, schema)
    for name, part in schema.get("properties", {}).items():
        yield from find_schema_faults(f"{where}.{name}", part)
    for part in [*schema.get("oneOf", []), *([schema["items"]] if "items" in schema else [])]:
        yield from find_schema_faults(where, part)
    for name in schema.get("required", []):
        if name not in schema["properties"]:
            yield f"{where}: {name} is required, but not described"
    re.compile(schema.get("pattern", ""))


# --- whether a value is as published

def fits(document: dict, schema: dict, value: Any) -> bool:
    """Tell whether a value is what a schema describes."""
    schema = resolve(document, schema)
    if "oneOf" in schema:
        return sum(fits(document, part, value) for part in schema["oneOf"]) == 1
    if isinstance(value, float) and value.is_integer():  # in JSON Schema, 1.0 is an integer
        value = int(value)
    kind = schema["type"]
    if not isinstance(value, TYPES[kind]) or isinstance(value, bool):
        return False
    if kind == "object":
        known = schema.get("properties", {})
        return (value.keys() >= set(schema.get("required", []))
                and (value.keys() <= known.keys() or schema.get("additionalProperties", True))
                and all(fits(document, known[name], value[name])
                        for name in known.keys() & value.keys()))
    if kind == "array":
        return (schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
                and all(fits(document, schema["items"], item) for item in value))
    if kind == "string":
        # Patterns are ECMAScript's, where $ does not match before a line break at the end.
        pattern = schema.get("pattern", "").replace("$", r"\Z")
        return (schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
                and value in schema.get("enum", [value])
                and bool(re.search(pattern, value)))
    return kind == "null" or schema.get("minimum", value) <= value <= schema.get("maximum", value)


def find_difference(document: dict, method: str, path: str, answer: Answered) -> str:
    """Return what is different in an answer from what is published, or "" if nothing is.

    `path` is the template, like "/things/{id}".
    """
    where = f"{method} {path}: "
    responses = document["paths"][path][method.lower()]["responses"]
    if str(answer.status) not in responses:
        return f"{where}the status {answer.status} is not published"
    response = resolve(document, responses[str(answer.status)])
    for name, header in response.get("headers", {}).items():
        if header.get("required") and name.lower() not in answer.headers:
            return f"{where}{answer.status} has no {name}"
    contents = response.get("content", {})
    if not contents:
        return f"{where}{answer.status} has a body" if answer.body else ""
    media_type = answer.headers.get("content-type", "").partition(";")[0]
    if media_type not in contents:
        return f"{where}{answer.status} has the type {media_type!r}"
    value = answer.json if media_type.endswith("json") else answer.body.decode()
    if not fits(document, contents[media_type]["schema"], value):
        return f"{where}{answer.status} has another content: {value}"
    return ""
