"""What messages carry: JSON, queries, fields that are validated, and pages of a collection.

Law: nothing here knows a socket, a header or a database.
"""
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlencode

from microshop.chassis.errors import BadRequest, UnprocessableContent, excerpt

MAX_INTEGER = 2**53 - 1   # the largest that every JSON client can represent (RFC 8259 section 6)
MAX_PAGE = 1000           # rows, or ids, in one request
PAGE = 100                # rows, if the request does not say

# Ids as almost all clients send them: without leading zeros, and with at most 15 digits, so never
# more than MAX_INTEGER. Such a list needs no further check.
PLAIN_IDS = re.compile(r"[1-9][0-9]{0,14}+(?>(?:,[1-9][0-9]{0,14}+)*)")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# As a pattern for other languages, too: no control character, and not only spaces.
TEXT = r"^[^\x00-\x1f\x7f-\x9f]*[^\x00-\x1f\x7f-\x9f\s][^\x00-\x1f\x7f-\x9f]*$"

encode = json.JSONEncoder(
    separators=(",", ":"), ensure_ascii=False, allow_nan=False, check_circular=False).encode


def parse_json(body: bytes) -> Any:
    """Parse a body as UTF-8 JSON.

    Raises BadRequest, even for what Python would accept but could not pass on safely: NaN,
    infinite numbers, repeated names and lone surrogates.
    """
    try:
        value = json.loads(body.decode(), object_pairs_hook=_make_object)
        encode(value).encode()  # raises ValueError for numbers and surrogates that are not JSON
        return value
    except RecursionError:
        raise BadRequest("the body is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from None


def _make_object(pairs: list[tuple[str, Any]]) -> dict:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a name appears twice")
    return members


# --- fields

class Integer(NamedTuple):
    """A field that holds an integer from `least` to `most`; required if `default` is None."""

    least: int = 1
    most: int = MAX_INTEGER
    default: int | None = None

    def check(self, value: Any) -> int:
        """Return a valid value. Raises ValueError that says what is required."""
        if isinstance(value, float) and value.is_integer():  # JSON Schema takes 1.0 for an integer
            value = int(value)
        is_integer = type(value) is int  # isinstance() would accept True and False
        if not is_integer or not self.least <= value <= self.most:
            raise ValueError(f"must be an integer from {self.least} to {self.most}")
        return value

    def schema(self) -> dict:
        """Return the JSON Schema of what check() accepts."""
        schema = {"type": "integer", "format": "int64",
                  "minimum": self.least, "maximum": self.most}
        return schema if self.default is None else {**schema, "default": self.default}


class Text(NamedTuple):
    """A required field for text of 1 to `longest` characters.

    Spaces around it are removed, but they count: so a client knows in advance what is too long.
    """

    longest: int = 200
    default: None = None

    def check(self, value: Any) -> str:
        """Return the text without the spaces around it. Raises ValueError as Integer.check does."""
        text = value.strip() if isinstance(value, str) else ""
        if not text or len(value) > self.longest or CONTROL.search(value):
            raise ValueError(
                f"must be text of 1 to {self.longest} characters, without control characters")
        return text

    def schema(self) -> dict:
        """Return the JSON Schema of what check() accepts."""
        return {"type": "string", "minLength": 1, "maxLength": self.longest, "pattern": TEXT}


FieldTable = Mapping[str, Integer | Text]  # the fields of a JSON object, by name


def validate(value: Any, fields: FieldTable) -> dict[str, Any]:
    """Return the fields of a JSON object in the order of the table, defaults filled in.

    Raises UnprocessableContent, which names the fields that are invalid, missing or unknown.
    """
    if not isinstance(value, dict):
        raise UnprocessableContent({"body": "must be a JSON object"})
    valid, errors = {}, {}
    for name, field in fields.items():
        try:
            valid[name] = field.check(value.get(name, field.default))
        except ValueError as reason:
            errors[name] = str(reason)
    errors.update({name: "is not a known field" for name in value if name not in fields})
    if errors:
        raise UnprocessableContent(errors)
    return valid


# --- queries and pages

LIMIT = Integer(least=1, most=MAX_PAGE)
AFTER = Integer(least=0)
ID = Integer()


@dataclass
class Page:
    """The part of a collection to show: at most `limit` rows, whose ids are greater than `after`.

    `ids` is a JSON list of the ids to which the rows are restricted, or None for no restriction.
    """

    limit: int
    after: int
    ids: str | None


def parse_query(query: str, names: Collection[str]) -> dict[str, str]:
    """Return the parameters with these names, from the part of a target after its `?`.

    All others are ignored, whatever they contain: they may be meant for another process, or for
    none. Raises BadRequest, which names the parameter, for one of these that appears twice.
    """
    found: dict[str, str] = {}
    if not query:
        return found
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name in found:
            raise BadRequest(f"{name}: this parameter must not appear twice")
        if name in names:
            found[name] = value
    return found


def parse_page(query: str) -> Page:
    """Return the page that a query asks for. Raises BadRequest, which names the parameter."""
    given = parse_query(query, ("limit", "after", "ids"))
    limit = _parse_integer("limit", given["limit"], LIMIT) if "limit" in given else PAGE
    after = _parse_integer("after", given["after"], AFTER) if "after" in given else 0
    ids = _parse_ids(given["ids"]) if "ids" in given else None
    return Page(limit, after, ids)


def next_query(query: str, after: int) -> str:
    """Return the query for the next page: another `after`, and all other parameters unchanged."""
    # With surrogateescape, bytes that are not UTF-8 come out as they went in.
    pairs = parse_qsl(query, keep_blank_values=True, errors="surrogateescape")
    kept = [(name, value) for name, value in pairs if name != "after"]
    return urlencode([*kept, ("after", after)], safe=",", errors="surrogateescape")


def _parse_ids(text: str) -> str:
    """Return comma-separated ids as a JSON list."""
    if not PLAIN_IDS.fullmatch(text):
        text = ",".join([str(_parse_integer("ids", part, ID)) for part in text.split(",")])
    count = text.count(",") + 1
    if count > MAX_PAGE:
        raise BadRequest(f"ids: at most {MAX_PAGE} allowed, got {count}")
    return f"[{text}]"


def _parse_integer(name: str, text: str, field: Integer) -> int:
    is_number = text.isascii() and text.isdigit() and len(text) <= 16
    if not is_number or not field.least <= int(text) <= field.most:
        raise BadRequest(
            f"{name}: {excerpt(text)!r} is not an integer from {field.least} to {field.most}")
    return int(text)
