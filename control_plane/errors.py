"""Exceptions of the control plane; each carries the HTTP status and the short code that a client sees.

ControlPlaneError       500 internal_error
├── SettingsError       500 bad_settings          a variable has a bad value; the program stops
├── PreflightError      500 preflight_failed      this machine cannot run llmos as it is
├── BadRequest          400 invalid_request
├── Unauthorized        401 invalid_api_key
│   ├── InvalidSession  401 invalid_session       the session has expired or was revoked
│   └── LoginFailed     401 login_failed          name or password is wrong; never which
├── Forbidden           403 forbidden             the key's role may not do this
├── NotFound            404 not_found             no such model, version, …
├── Conflict            409 conflict              the object is not in a state that allows this
├── PreconditionFailed  412 precondition_failed   somebody else changed it since it was read
├── RateLimited         429 rate_limit_exceeded   too many requests, tokens or failed logins; says when to come back
├── ClientGone          499 client_gone           the client hung up; nobody reads the answer
├── RequestTimeout      504 timeout
│   └── ClientTimeout   504 client_timeout        the time that the client itself set, timeout_ms, has passed
├── Overloaded          503 overloaded            the engine's queue is full; try again
├── DatabaseUnavailable 503 database_unavailable  it is away, locked or restarting; try again
└── ServingError        502 serving_error         Triton or the model's process is gone or failed
    ├── ModelNotReady   503 model_not_ready       installed, but loading or failed to load
    └── TritonUnavailable 503 triton_unavailable  no Triton answers at all
"""


class ControlPlaneError(Exception):
    status = 500
    code = "internal_error"
    retry_after_s: int | None = None


class SettingsError(ControlPlaneError):
    code = "bad_settings"


class PreflightError(ControlPlaneError):
    code = "preflight_failed"


class BadRequest(ControlPlaneError):
    status = 400
    code = "invalid_request"


class Unauthorized(ControlPlaneError):
    status = 401
    code = "invalid_api_key"


class InvalidSession(Unauthorized):
    code = "invalid_session"


class LoginFailed(Unauthorized):
    code = "login_failed"


class Forbidden(ControlPlaneError):
    status = 403
    code = "forbidden"


class NotFound(ControlPlaneError):
    status = 404
    code = "not_found"


class Conflict(ControlPlaneError):
    status = 409
    code = "conflict"


class PreconditionFailed(ControlPlaneError):
    status = 412
    code = "precondition_failed"


class RateLimited(ControlPlaneError):
    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ClientGone(ControlPlaneError):
    status = 499
    code = "client_gone"


class RequestTimeout(ControlPlaneError):
    status = 504
    code = "timeout"


class ClientTimeout(RequestTimeout):
    code = "client_timeout"


class Overloaded(ControlPlaneError):
    status = 503
    code = "overloaded"


class DatabaseUnavailable(ControlPlaneError):
    status = 503
    code = "database_unavailable"


class ServingError(ControlPlaneError):
    status = 502
    code = "serving_error"


class ModelNotReady(ServingError):
    status = 503
    code = "model_not_ready"


class TritonUnavailable(ServingError):
    status = 503
    code = "triton_unavailable"
