"""Errors as exceptions that carry an HTTP status (RFC 9110 section 15).

Any code that a handler calls may raise one. A single place in the chassis turns it into the answer,
a problem document (application/problem+json, RFC 9457).
"""
from collections.abc import Sequence
from http import HTTPStatus
from itertools import islice

RETRY_SOON = ("Retry-After", "1")  # a header: the client may try again after a second
MAX_QUOTED = 100  # characters of a client's text that a message repeats
MAX_ERRORS = 20   # invalid fields that an answer lists; it says how many more there are

# Names of statuses as in RFC 9110: Python before 3.13 has older ones for four of them.
PHRASES = {status.value: status.phrase for status in HTTPStatus} | {
    413: "Content Too Large", 414: "URI Too Long", 416: "Range Not Satisfiable",
    422: "Unprocessable Content"}


def excerpt(text: str) -> str:
    """Return the start of a client's text, to be quoted: an answer must not grow with the text."""
    return text if len(text) <= MAX_QUOTED else text[:MAX_QUOTED] + "..."


class ServiceError(Exception):
    """An answer that is not a success.

    `detail` tells a person what is wrong. `headers` are added to the answer. Every other keyword
    argument becomes a member of the problem document (RFC 9457 section 3.2).
    """

    status = HTTPStatus.INTERNAL_SERVER_ERROR

    def __init__(self, detail: str, headers: Sequence[tuple[str, str]] = (), **members: object):
        super().__init__(detail)
        self.detail, self.headers, self.members = detail, headers, members

    def problem(self) -> dict:
        """Return the problem document, without the request's id."""
        return {"type": "about:blank", "title": PHRASES[self.status], "status": self.status.value,
                "detail": self.detail, **self.members}


# --- 4xx: the client has to change something

class BadRequest(ServiceError): status = HTTPStatus.BAD_REQUEST                          # 400
class Unauthorized(ServiceError): status = HTTPStatus.UNAUTHORIZED                       # 401
class Forbidden(ServiceError): status = HTTPStatus.FORBIDDEN                             # 403
class NotFound(ServiceError): status = HTTPStatus.NOT_FOUND                              # 404
class MethodNotAllowed(ServiceError): status = HTTPStatus.METHOD_NOT_ALLOWED             # 405
class RequestTimeout(ServiceError): status = HTTPStatus.REQUEST_TIMEOUT                  # 408
class Conflict(ServiceError): status = HTTPStatus.CONFLICT                               # 409
class LengthRequired(ServiceError): status = HTTPStatus.LENGTH_REQUIRED                  # 411
class PreconditionFailed(ServiceError): status = HTTPStatus.PRECONDITION_FAILED          # 412
class ContentTooLarge(ServiceError): status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE        # 413
class TargetTooLong(ServiceError): status = HTTPStatus.REQUEST_URI_TOO_LONG              # 414
class UnsupportedMediaType(ServiceError): status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE     # 415
class ExpectationFailed(ServiceError): status = HTTPStatus.EXPECTATION_FAILED            # 417
class TooManyRequests(ServiceError): status = HTTPStatus.TOO_MANY_REQUESTS               # 429
class FieldsTooLarge(ServiceError): status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE  # 431


class UnprocessableContent(ServiceError):                                                # 422
    """A body that is well-formed but invalid; `errors` says what is wrong, by name of the field.

    The answer lists the first MAX_ERRORS of them.
    """

    status = HTTPStatus.UNPROCESSABLE_ENTITY

    def __init__(self, errors: dict[str, str]):
        listed = [{"field": excerpt(field), "detail": detail}
                  for field, detail in islice(errors.items(), MAX_ERRORS)]
        summary = f"{listed[0]['field']}: {listed[0]['detail']}"
        if len(errors) > 1:
            summary += f" (and {len(errors) - 1} more)"
        super().__init__(summary, errors=listed)


# --- 5xx: the service cannot do it, or not now

class CodingNotImplemented(ServiceError): status = HTTPStatus.NOT_IMPLEMENTED            # 501
class MethodNotImplemented(ServiceError): status = HTTPStatus.NOT_IMPLEMENTED            # 501
class ServiceUnavailable(ServiceError): status = HTTPStatus.SERVICE_UNAVAILABLE          # 503
class VersionNotSupported(ServiceError): status = HTTPStatus.HTTP_VERSION_NOT_SUPPORTED  # 505
class InsufficientStorage(ServiceError): status = HTTPStatus.INSUFFICIENT_STORAGE        # 507


# --- 5xx about another service, which was called on behalf of the client

class UpstreamError(ServiceError):
    """A call to another service failed; the problem document names it as `service`.

    `predicate` is the rest of the sentence "the users service ...", like "did not respond in time".
    `kind` says in one word, for metrics and traces, why there was no response.
    """

    kind = ""

    def __init__(self, service: str, predicate: str, headers: Sequence[tuple[str, str]] = ()):
        super().__init__(f"the {service} service {predicate}", headers, service=service)


class BadGateway(UpstreamError):                                                         # 502
    """The service gave no valid answer."""

    status = HTTPStatus.BAD_GATEWAY
    kind = "invalid"


class Unreachable(BadGateway):
    """No connection could be made, so not a byte of the request was sent."""

    kind = "refused"


class Broken(BadGateway):
    """The connection broke, so it is unknown whether the request was carried out."""

    kind = "broken"


class Stale(Broken):
    """A kept connection broke, perhaps one to a process that is gone: a new one may work."""


class UpstreamUnavailable(UpstreamError):                                                # 503
    """The service was not called."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    kind = "not called"


class BreakerOpen(UpstreamUnavailable):
    """Every circuit breaker of the service is open."""

    kind = "breaker"


class BulkheadFull(UpstreamUnavailable):
    """As many calls to the service are in flight as its bulkhead admits."""

    kind = "bulkhead"


class GatewayTimeout(UpstreamError):                                                     # 504
    """The service did not answer in time, so it is unknown whether the request was carried out."""

    status = HTTPStatus.GATEWAY_TIMEOUT
    kind = "timeout"
