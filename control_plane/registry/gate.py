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
    newest = {evaluation.suite: evaluation for evaluation in sorted(evaluations, key=lambda each: each.id)}
    for name, limits in model.thresholds.items():
        suite, _, metric = name.rpartition(".")
        value = None if suite not in newest else newest[suite].metrics.get(metric)
        if value is None:
            found.append(f"{name} was not measured; run an evaluation of suite {suite!r}")
        elif value < limits.get("min", value):
            found.append(f"{name} is {value:g}; expected at least {limits['min']:g}")
        elif value > limits.get("max", value):
            found.append(f"{name} is {value:g}; expected at most {limits['max']:g}")
    return found
