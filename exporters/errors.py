"""Exceptions of the exporter, each with a code for the ``error`` event.

    ExportError                 INTERNAL                  our own fault
    ├── InvalidConfig           INVALID_CONFIG            a setting that cannot work
    ├── OutputExists            OUTPUT_EXISTS             the output folder is taken
    ├── InvalidCheckpoint       INVALID_CHECKPOINT        incomplete, damaged or contradictory files
    ├── UnsafeCheckpoint        UNSAFE_CHECKPOINT         exporting would run code or leave the folder
    ├── UnsupportedArchitecture UNSUPPORTED_ARCHITECTURE  a sound checkpoint that we cannot export
    ├── InvalidVersion          INVALID_VERSION           a version folder that is changed, unsafe or has no proof
    ├── EngineFailed            ENGINE_FAILED             the engine could not run the version to certify it
    ├── OutOfSpace              OUT_OF_SPACE              the disk is full, or a file may not grow so large
    ├── InvalidAdapter          INVALID_ADAPTER           incomplete or damaged, or made for another base
    └── UnsupportedAdapter      UNSUPPORTED_ADAPTER       a sound adapter that the version has no slot for
    ExportCancelled             CANCELLED                 a signal asked us to stop

This module imports nothing of ours.
"""


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


class EngineFailed(ExportError):
    code = "ENGINE_FAILED"


class OutOfSpace(ExportError):
    code = "OUT_OF_SPACE"


class ExportCancelled(BaseException):
    """Like KeyboardInterrupt no Exception, so that no library on the way up takes it for an error of its own.

    KeyboardInterrupt itself will not do: one that passes through ``exec`` of a string, which the tracer uses, ends the
    process by signal even when it is caught afterwards.
    """

    code = "CANCELLED"
