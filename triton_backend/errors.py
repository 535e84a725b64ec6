"""Exceptions of the engine, each with the Triton error code that a client sees.

    EngineError            INTERNAL      our own fault
    ├── InvalidRequest     INVALID_ARG   the request can never succeed as it is
    ├── QueueFull          UNAVAILABLE   try again later
    ├── RequestCancelled   CANCELLED     the client left, or its deadline passed
    ├── EngineStopped      UNAVAILABLE   the model is being unloaded
    └── VersionFolderError INTERNAL      what lies on disk is incomplete, changed or not ours

Triton's streaming gRPC and HTTP interfaces drop the code of an error and keep its text, so the text begins with the
code: ``INVALID_ARG: max_tokens has value 0; expected …``. This module imports nothing of ours.
"""


class EngineError(Exception):
    """Base of all errors that are told to a client; ``str(error)`` is ``CODE: message``."""

    code = "INTERNAL"

    def __str__(self) -> str:
        return f"{self.code}: {super().__str__()}"


class InvalidRequest(EngineError):
    code = "INVALID_ARG"


class QueueFull(EngineError):
    code = "UNAVAILABLE"


class EngineStopped(EngineError):
    code = "UNAVAILABLE"


class RequestCancelled(EngineError):
    code = "CANCELLED"


class VersionFolderError(EngineError):
    """A version folder cannot be trusted or read; raised while loading, never while serving."""
