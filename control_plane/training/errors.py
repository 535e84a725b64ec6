"""Exceptions of the training recipes, each with a code for the ``error`` event.

    TrainingError        INTERNAL          our own fault
    ├── InvalidOption    INVALID_OPTION    a setting that cannot work
    ├── OutputExists     OUTPUT_EXISTS     the output folder is taken
    ├── InvalidData      INVALID_DATA      a file of training data that cannot be read
    ├── CorpusMissing    CORPUS_MISSING    there is no text to train on
    ├── LossNotFinite    LOSS_NOT_FINITE   the NaN watchdog stopped the run
    └── TrainingCancelled CANCELLED        a signal asked us to stop

This module imports nothing of ours.
"""


class TrainingError(Exception):
    """Base of all errors a recipe reports; ``str(error)`` says what, which value, what was expected, what to do."""

    code = "INTERNAL"


class InvalidOption(TrainingError):
    code = "INVALID_OPTION"


class OutputExists(TrainingError):
    code = "OUTPUT_EXISTS"


class InvalidData(TrainingError):
    code = "INVALID_DATA"


class CorpusMissing(TrainingError):
    code = "CORPUS_MISSING"


class LossNotFinite(TrainingError):
    code = "LOSS_NOT_FINITE"


class TrainingCancelled(TrainingError):
    code = "CANCELLED"
