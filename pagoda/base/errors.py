"""Every error a user can meet, and the HTTP status it answers with.

    PagodaError                      500
    +-- ConfigError                  an argument, flag or combination cannot work (process exits with one line)
    +-- ModelFileError               a model file is missing, truncated, corrupt or of an unsupported kind
    |   +-- ModelNotFound            no such model here or on the hub
    +-- UnsupportedModel             the architecture or one of its features is not implemented
    +-- OutOfMemory                  the model or its KV cache does not fit; says what to lower and by how much
    +-- RequestError                 belongs to one request, never disturbs another
        +-- InvalidRequest      400  bad value; `param` names the field
        +-- Unauthorized        401
        +-- NotFound            404  unknown model or route
        +-- PayloadTooLarge     413
        +-- QueueFull           429  admission limit; the client may retry
        +-- DeadlineExceeded    504  its time was over before it had any answer
        +-- EngineDead          503  the engine process has stopped
        +-- RequestFailed       500  the engine could not finish this request (NaN logits, ...)

`assert` is for our bugs; these are for the user's.
"""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "ConfigError",
    "DeadlineExceeded",
    "EngineDead",
    "InvalidRequest",
    "ModelFileError",
    "ModelNotFound",
    "NotFound",
    "OutOfMemory",
    "PagodaError",
    "PayloadTooLarge",
    "QueueFull",
    "RequestError",
    "RequestFailed",
    "Unauthorized",
    "UnsupportedModel",
    "request_error",
]


class PagodaError(Exception):
    """Root of the tree. `http_status` and `type` shape the OpenAI error body."""

    http_status = 500
    type = "InternalServerError"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(PagodaError):
    """A flag or a combination of flags that cannot work."""


class ModelFileError(PagodaError):
    """A model file cannot be used. The message names file, tensor and remedy."""

    def __init__(self, message: str, *, path: str | Path | None = None, tensor: str | None = None) -> None:
        where = "".join([f"{path}: " if path else "", f"tensor `{tensor}`: " if tensor else ""])
        super().__init__(where + message)
        self.path, self.tensor = path, tensor


class ModelNotFound(ModelFileError):
    """No such model in the given place."""


class UnsupportedModel(PagodaError):
    """The architecture, or a feature the checkpoint needs, is not implemented."""


class OutOfMemory(PagodaError):
    """The model or its KV cache does not fit."""


class RequestError(PagodaError):
    """Root of errors that belong to one request."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


class InvalidRequest(RequestError):
    http_status = 400
    type = "BadRequestError"


class Unauthorized(RequestError):
    http_status = 401
    type = "AuthenticationError"


class NotFound(RequestError):
    http_status = 404
    type = "NotFoundError"


class PayloadTooLarge(RequestError):
    http_status = 413
    type = "PayloadTooLargeError"


class QueueFull(RequestError):
    http_status = 429
    type = "RateLimitError"


class DeadlineExceeded(RequestError):
    http_status = 504
    type = "TimeoutError"


class EngineDead(RequestError):
    http_status = 503
    type = "ServiceUnavailableError"


class RequestFailed(RequestError):
    http_status = 500
    type = "InternalServerError"


def request_error(name: str | None, message: str, param: str | None = None) -> RequestError:
    """The RequestError of that class name, as it crossed a process boundary; RequestFailed for any other name."""
    known: dict[str, type[RequestError]] = {cls.__name__: cls for cls in RequestError.__subclasses__()}
    return known.get(name or "", RequestFailed)(message, param=param)
