"""How different an exported version may be from the original: the limits of a certificate, per precision.

fp32 promises the original's own tokens, so its limits are those of arithmetic in another order. A lower precision
promises less, and what it promises is measured: how often it picks the original's token, how far its distributions are
(Kullback–Leibler divergence in nats), and what it costs in perplexity on text. Standard library only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from exporters.errors import InvalidConfig


@dataclass(frozen=True)
class Thresholds:
    """Limits of one certificate; None: measured and reported, but not required.

    tie_logit_gap                  two logits closer than this are a tie, which is reported and counts as no difference
    max_mismatches                 prompts whose greedy tokens differ without a tie
    max_relative_logit_difference  largest |exported − original| logit, as a fraction of the largest |logit|
    min_agreement                  fraction (0–1) of the version's greedy tokens that are the original's choice there
    min_text_agreement             the same on text, after the text's own tokens
    max_kl_mean, max_kl_p99        KL(original ‖ exported) on text in nats: mean, and 99th percentile of the positions
    max_perplexity_ratio           exported perplexity on text / the original's
    min_cosine                     encoders: smallest cosine similarity of an embedding and the original's
    """

    tie_logit_gap: float
    max_mismatches: int | None = None
    max_relative_logit_difference: float | None = None
    min_agreement: float | None = None
    min_text_agreement: float | None = None
    max_kl_mean: float | None = None
    max_kl_p99: float | None = None
    max_perplexity_ratio: float | None = None
    min_cosine: float | None = None


DEFAULTS: Mapping[str, Thresholds] = {
    # fp32 sums in another order differ by up to about a tenth of the gap.
    "fp32": Thresholds(
        tie_logit_gap=1e-3,
        max_mismatches=0,
        max_relative_logit_difference=1e-3,
        max_kl_mean=1e-5,
        max_kl_p99=1e-4,
        max_perplexity_ratio=1.0001,
        min_cosine=0.99999,
    ),
    "fp16": Thresholds(
        tie_logit_gap=0.05,
        min_agreement=0.97,
        min_text_agreement=0.97,
        max_kl_mean=2e-3,
        max_kl_p99=0.02,
        max_perplexity_ratio=1.005,
        min_cosine=0.9995,
    ),
    "bf16": Thresholds(
        tie_logit_gap=0.2,
        min_agreement=0.94,
        min_text_agreement=0.95,
        max_kl_mean=0.01,
        max_kl_p99=0.1,
        max_perplexity_ratio=1.02,
        min_cosine=0.995,
    ),
    "int8": Thresholds(
        tie_logit_gap=0.1,
        min_agreement=0.9,
        min_text_agreement=0.93,
        max_kl_mean=0.02,
        max_kl_p99=0.25,
        max_perplexity_ratio=1.03,
        min_cosine=0.98,
    ),
    # Four bits cost a small model visibly; larger ones stay far below these.
    "int4": Thresholds(
        tie_logit_gap=0.1,
        min_agreement=0.7,
        min_text_agreement=0.75,
        max_kl_mean=0.25,
        max_kl_p99=2.5,
        max_perplexity_ratio=1.3,
        min_cosine=0.9,
    ),
}
NAMES = tuple(field.name for field in dataclasses.fields(Thresholds))


def thresholds_for(precision: str, changes: Mapping[str, float] | None = None) -> Thresholds:
    """The defaults of ``precision`` with ``changes`` by name; raises InvalidConfig for an unknown name or no number."""
    checked: dict[str, float] = {}
    for name, value in (changes or {}).items():
        if name not in NAMES:
            raise InvalidConfig(f"threshold {name!r} is unknown; expected one of {', '.join(NAMES)}")
        if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise InvalidConfig(f"threshold {name} has value {value!r}; expected a number ≥ 0")
        if name.startswith("min_") and value > 1:
            raise InvalidConfig(f"threshold {name} has value {value!r}; expected a fraction from 0 to 1")
        checked[name] = int(value) if name == "max_mismatches" else float(value)
    return dataclasses.replace(DEFAULTS[precision], **checked)  # type: ignore[arg-type]


def parse_threshold(text: str) -> tuple[str, float]:
    """``max_kl_mean=0.01`` → its name and value; raises InvalidConfig."""
    name, separator, value = text.partition("=")
    try:
        return name.strip(), float(value)
    except ValueError:
        given = f"threshold {text!r} has no number" if separator else f"threshold {text!r} has no '='"
        raise InvalidConfig(f"{given}; expected NAME=VALUE with one of {', '.join(NAMES)}") from None


@dataclass(frozen=True)
class Check:
    """One limit and what was measured. ``limit`` None: only reported."""

    name: str
    value: float | None
    limit: float | None
    passed: bool


def at_most(name: str, value: float | None, limit: float | None) -> Check:
    """A check whose limit is no threshold of its own. What is not a number fails, unless it is only reported."""
    value = value if value is not None and math.isfinite(value) else None
    return Check(name, value, limit, limit is None or (value is not None and value <= limit))


def check(thresholds: Thresholds, measured: Mapping[str, float | None]) -> list[Check]:
    """Compare ``measured``, by name of the threshold, with its limits. What is required but not a number fails."""
    found = []
    for name, value in measured.items():
        limit = getattr(thresholds, name)
        if limit is None:
            passed = True
        elif value is None or not math.isfinite(value):
            passed = False
        else:
            passed = value >= limit if name.startswith("min_") else value <= limit
        found.append(Check(name, value, limit, passed))
    return found
