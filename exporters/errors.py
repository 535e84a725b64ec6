"""Exceptions of the exporter, each with a code for the ``error`` event.

    ExportError                 INTERNAL                  our own fault
    ├── InvalidConfig           INVALID_CONFIG            a setting that cannot work
    ├── OutputExists            OUTPUT_EXISTS             the output folder is taken
    ├── InvalidCheckpoint       INVALID_CHECKPOINT        incomplete, damaged or contradictory files
    ├── UnsafeCheckpoint        UNSAFE_CHECKPOINT         exporting would run code or leave the folder
    ├── UnsupportedArchitecture UNSUPPORTED_ARCHITECTURE  a sound checkpoint that we cannot export
    ├── InvalidVersion          INVALID_VERSION           a version folder that is changed, unsafe or has no proof
    ├── InvalidData             INVALID_DATA              a data file that cannot be read, with the line
    ├── EngineFailed            ENGINE_FAILED             the engine could not run the version
    │   └── RequestRefused                                one request that it would not run
    ├── OutOfSpace              OUT_OF_SPACE              the disk is full, or a file may not grow so large
    ├── InvalidAdapter          INVALID_ADAPTER           incomplete or damaged, or made for another base
    └── UnsupportedAdapter      UNSUPPORTED_ADAPTER       a sound adapter that the version has no slot for
    ExportCancelled             CANCELLED                 a signal asked us to stop

This module imports nothing of ours.
"""


def reason_of(error: BaseException) -> str:
    """Kind and first line of an error of another library; some say nothing, or nothing without their kind."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


class ExportError(Exception):
    """Base of all errors an export reports; ``str(error)`` says what, which value, what was expected, what to do."""

    code = "INTERNAL"


class InvalidConfig(ExportError):
    code = "INVALID_CONFIG"


class OutputExists(ExportError):
    code = "OUTPUT_EXISTS"


class InvalidCheckpoint(ExportError):
    code = "INVALID_CHECKPOINT"


class UnsafeCheckpoint(ExportError):
    code = "UNSAFE_CHECKPOINT"


class UnsupportedArchitecture(ExportError):
    code = "UNSUPPORTED_ARCHITECTURE"


class InvalidVersion(ExportError):
    code = "INVALID_VERSION"


class InvalidAdapter(ExportError):
    code = "INVALID_ADAPTER"


class UnsupportedAdapter(ExportError):
    code = "UNSUPPORTED_ADAPTER"


class InvalidData(ExportError):
    code = "INVALID_DATA"


class EngineFailed(ExportError):
    code = "ENGINE_FAILED"


class RequestRefused(EngineFailed):
    """``reason`` is the engine's own sentence, its code included."""

    def __init__(self, request_id: str, reason: str) -> None:
        super().__init__(f"the engine refused request {request_id!r}: {reason}")
        self.request_id = request_id
        self.reason = reason


class OutOfSpace(ExportError):
    code = "OUT_OF_SPACE"


class ExportCancelled(BaseException):
    """Like KeyboardInterrupt no Exception, so that no library on the way up takes it for an error of its own.

    KeyboardInterrupt itself will not do: one that passes through ``exec`` of a string, which the tracer uses, ends the
    process by signal even when it is caught afterwards.
    """

    code = "CANCELLED"
