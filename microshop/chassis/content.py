"""What messages carry: JSON, written compactly and read strictly, its fields, and pages of a collection."""
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from microshop.chassis.errors import BadRequest, UnprocessableContent

MAX_INTEGER = 2**53 - 1   # the largest that every JSON client can hold
MAX_PAGE = 1000           # rows, and ids, in one request
PLAIN_IDS = re.compile("[1-9][0-9]{0,14}+(?:,[1-9][0-9]{0,14}+)*+")  # JSON as they are, and within MAX_INTEGER
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False, check_circular=False).encode


def parse_json(body: bytes) -> Any:
    """Parse a body as UTF-8 JSON. Raises BadRequest, also for NaN, repeated keys and lone surrogates."""
    try:
        value = json.loads(body.decode(), object_pairs_hook=_unique)
        encode(value).encode()  # refuses what could not be written again: NaN, 1e999, lone surrogates
        return value
    except RecursionError:
        raise BadRequest("the body is no JSON: it is nested too deep") from None
    except ValueError as error:
        raise BadRequest(f"the body is no JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("the same name comes twice")
    return members


def parse_query(query: str) -> dict[str, str]:
    """Parse the part of a target after its `?`. Raises BadRequest."""
    if not query:
        return {}
    try:
        return _unique(parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=100))
    except ValueError as error:
        raise BadRequest(f"the query is malformed: {error}") from None


class Integer(NamedTuple):
    """A field that holds an integer from `least` to MAX_INTEGER."""

    least: int = 1
    default: int | None = None  # if it is left out; None where it may not be

    def check(self, value: Any) -> int:
        if type(value) is not int or not self.least <= value <= MAX_INTEGER:  # True is an instance of int
            raise ValueError(f"must be an integer from {self.least} to {MAX_INTEGER}")
        return value


class Text(NamedTuple):
    """A field that holds a text of 1 to `longest` characters; spaces around it do not count."""

    longest: int = 200
    default: None = None

    def check(self, value: Any) -> str:
        text = value.strip() if isinstance(value, str) else ""
        if not 1 <= len(text) <= self.longest or CONTROL.search(value):
            raise ValueError(f"must be a text of 1 to {self.longest} characters, none of them a control character")
        return text


FieldTable = Mapping[str, Integer | Text]  # the fields of a JSON object, by name


def validate(value: Any, fields: FieldTable) -> dict[str, Any]:
    """Return a JSON object's fields in the table's order. Raises UnprocessableContent naming each that is wrong."""
    if not isinstance(value, dict):
        raise UnprocessableContent({"body": "must be a JSON object"})
    valid, errors = {}, {name: "is not known here" for name in value if name not in fields}
    for name, field in fields.items():
        try:
            valid[name] = field.check(value.get(name, field.default))
        except ValueError as reason:
            errors[name] = str(reason)
    if errors:
        raise UnprocessableContent(errors)
    return valid


class Page(NamedTuple):
    """Which part of a collection to show: `limit` rows after the id `after`, of those in `ids` if given."""

    limit: int
    after: int
    ids: str | None  # a JSON list


def parse_page(query: dict[str, str]) -> Page:
    """Return the page that a query asks for. Raises BadRequest naming the parameter."""
    limit = _integer("limit", query["limit"], 1, MAX_PAGE) if "limit" in query else 100
    after = _integer("after", query["after"], 0, MAX_INTEGER) if "after" in query else 0
    if "ids" not in query:
        return Page(limit, after, None)
    ids = query["ids"]
    if not PLAIN_IDS.fullmatch(ids):  # then one after another, to name what is wrong
        ids = ",".join([str(_integer("ids", text, 1, MAX_INTEGER)) for text in ids.split(",")])
    if (count := ids.count(",") + 1) > MAX_PAGE:
        raise BadRequest(f"ids: {count} are more than {MAX_PAGE}")
    return Page(limit, after, f"[{ids}]")


def _integer(name: str, text: str, least: int, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 16) or not least <= int(text) <= most:
        raise BadRequest(f"{name}: {text!r} is no integer from {least} to {most}")
    return int(text)
