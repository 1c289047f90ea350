"""What messages carry: JSON, written compactly and read strictly, and pages of a collection."""
import json
import re
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from microshop.chassis.errors import BadRequest

MAX_ID = 2**53 - 1   # the largest integer that every JSON client can hold
MAX_PAGE = 1000      # rows, and ids, in one request

encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


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


class Page(NamedTuple):
    """Which part of a collection to show: `limit` rows after the id `after`, of those in `ids` if given."""

    limit: int
    after: int
    ids: str | None  # a JSON list


def parse_page(query: dict[str, str]) -> Page:
    """Return the page that a query asks for. Raises BadRequest naming the parameter."""
    limit = _integer("limit", query["limit"], 1, MAX_PAGE) if "limit" in query else 100
    after = _integer("after", query["after"], 0, MAX_ID) if "after" in query else 0
    if "ids" not in query:
        return Page(limit, after, None)
    ids = [_integer("ids", text, 1, MAX_ID) for text in query["ids"].split(",")]
    if len(ids) > MAX_PAGE:
        raise BadRequest(f"ids: {len(ids)} are more than {MAX_PAGE}")
    return Page(limit, after, str(ids))


def _integer(name: str, text: str, least: int, most: int) -> int:
    if not re.fullmatch("[0-9]{1,16}", text) or not least <= int(text) <= most:
        raise BadRequest(f"{name}: {text!r} is no integer from {least} to {most}")
    return int(text)
