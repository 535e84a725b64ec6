"""Exceptions of an evaluation over the endpoint, each with a code for the ``error`` event.

    EvaluationError      INTERNAL          our own fault
    ├── InvalidOption    INVALID_OPTION    a setting that cannot work
    ├── InvalidTask      INVALID_TASK      a task file, or its data, that cannot be used
    ├── NotInstalled     NOT_INSTALLED     lm-eval is an extra
    └── EndpointFailed   ENDPOINT_FAILED   the endpoint refused, or does not answer
    EvaluationCancelled  CANCELLED         a signal asked us to stop

This module imports nothing of ours.
"""


class EvaluationError(Exception):
    """Base of all errors that an evaluation reports; ``str(error)`` says what, which value, what was expected."""

    code = "INTERNAL"


class InvalidOption(EvaluationError):
    code = "INVALID_OPTION"


class InvalidTask(EvaluationError):
    code = "INVALID_TASK"


class NotInstalled(EvaluationError):
    code = "NOT_INSTALLED"


class EndpointFailed(EvaluationError):
    code = "ENDPOINT_FAILED"


class EvaluationCancelled(BaseException):
    """Like KeyboardInterrupt no Exception, so that no library on the way up takes it for an error of its own."""

    code = "CANCELLED"
