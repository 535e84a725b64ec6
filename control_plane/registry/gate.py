"""What a version must have shown before it may be served. Pure: rows in, sentences out."""

from __future__ import annotations

from collections.abc import Sequence

from control_plane.registry.tables import Evaluation, Model, Version


def objections(model: Model, version: Version, evaluations: Sequence[Evaluation]) -> list[str]:
    """Why ``version`` should not be served; empty if nothing speaks against it. ``evaluations`` are the version's."""
    found = []
    if version.passed is None:
        found.append("it has no certificate")
    elif not version.passed:
        found.append("its certificate failed: it is not equal to its checkpoint")
    # A suite may be run on different data, so it is the newest value of each metric that counts.
    measured = {
        f"{evaluation.suite}.{metric}": value
        for evaluation in sorted(evaluations, key=lambda each: each.id)
        for metric, value in evaluation.metrics.items()
    }
    for name, limits in model.thresholds.items():
        value = measured.get(name)
        if value is None:
            suite = name.rpartition(".")[0]
            found.append(f"{name} was not measured; run an evaluation of suite {suite!r}")
        elif value < limits.get("min", value):
            found.append(f"{name} is {value:g}; expected at least {limits['min']:g}")
        elif value > limits.get("max", value):
            found.append(f"{name} is {value:g}; expected at most {limits['max']:g}")
    return found
