"""What goes wrong, as exceptions that carry an HTTP status (RFC 9110 section 15).

Raise one anywhere below a handler; server.py turns it into problem+json in one place.
"""
from collections.abc import Sequence
from http import HTTPStatus


class ServiceError(Exception):
    """An answer that is not a success.

    `detail` tells a person what was wrong; `headers` are added to the answer; every other
    keyword becomes a member of the problem document (RFC 9457 section 3.2).
    """

    status = HTTPStatus.INTERNAL_SERVER_ERROR

    def __init__(self, detail: str, headers: Sequence[tuple[str, str]] = (), **members: object):
        super().__init__(detail)
        self.detail, self.headers, self.members = detail, headers, members

    def problem(self) -> dict:
        """Return the problem document, but for the request's id."""
        return {"type": "about:blank", "title": self.status.phrase, "status": self.status.value,
                "detail": self.detail, **self.members}


class BadRequest(ServiceError): status = HTTPStatus.BAD_REQUEST                                  # 400
class Unauthorized(ServiceError): status = HTTPStatus.UNAUTHORIZED                               # 401
class NotFound(ServiceError): status = HTTPStatus.NOT_FOUND                                      # 404
class MethodNotAllowed(ServiceError): status = HTTPStatus.METHOD_NOT_ALLOWED                     # 405
class RequestTimeout(ServiceError): status = HTTPStatus.REQUEST_TIMEOUT                          # 408
class Conflict(ServiceError): status = HTTPStatus.CONFLICT                                       # 409
class LengthRequired(ServiceError): status = HTTPStatus.LENGTH_REQUIRED                          # 411
class PreconditionFailed(ServiceError): status = HTTPStatus.PRECONDITION_FAILED                  # 412
class ContentTooLarge(ServiceError): status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE                # 413
class TargetTooLong(ServiceError): status = HTTPStatus.REQUEST_URI_TOO_LONG                      # 414
class UnsupportedMediaType(ServiceError): status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE             # 415
class ExpectationFailed(ServiceError): status = HTTPStatus.EXPECTATION_FAILED                    # 417
class TooManyRequests(ServiceError): status = HTTPStatus.TOO_MANY_REQUESTS                       # 429
class FieldsTooLarge(ServiceError): status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE          # 431
class CodingNotImplemented(ServiceError): status = HTTPStatus.NOT_IMPLEMENTED                    # 501
class ServiceUnavailable(ServiceError): status = HTTPStatus.SERVICE_UNAVAILABLE                  # 503
class VersionNotSupported(ServiceError): status = HTTPStatus.HTTP_VERSION_NOT_SUPPORTED          # 505
class InsufficientStorage(ServiceError): status = HTTPStatus.INSUFFICIENT_STORAGE                # 507


class UnprocessableContent(ServiceError):                                                        # 422
    """A body that is well-formed but makes no sense here; `errors` tells why, by field."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY

    def __init__(self, errors: dict[str, str]):
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        super().__init__(": ".join(next(iter(errors.items()))) + more,
                         errors=[{"field": field, "detail": detail} for field, detail in errors.items()])


class UpstreamError(ServiceError):
    """What is said about a service behind this one, which the problem names as its `service`."""

    def __init__(self, service: str, what: str, headers: Sequence[tuple[str, str]] = ()):
        super().__init__(f"the {service} service {what}", headers, service=service)


class BadGateway(UpstreamError): status = HTTPStatus.BAD_GATEWAY                                 # 502: no valid answer
class Unreachable(BadGateway): """No connection was made, so not a byte of the request was sent."""
class Broken(BadGateway): """The connection broke: nobody knows whether the request was carried out."""
class UpstreamUnavailable(UpstreamError): status = HTTPStatus.SERVICE_UNAVAILABLE                # 503: not even asked
class GatewayTimeout(UpstreamError): status = HTTPStatus.GATEWAY_TIMEOUT                         # 504
