"""Limits of a certificate: defaults, changes by name, and that each of them can fail."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from exporters import ExportConfig
from exporters.config import PRECISIONS
from exporters.errors import InvalidConfig
from exporters.held_out import MAX_TOKENS, read_text, windows_of
from exporters.thresholds import DEFAULTS, Thresholds, check, parse_threshold, thresholds_for

pytestmark = pytest.mark.unit


def test_every_precision_has_limits_and_fp32_the_strictest() -> None:
    assert set(DEFAULTS) == set(PRECISIONS)
    assert DEFAULTS["fp32"].max_mismatches == 0
    for precision in PRECISIONS[1:]:
        limits = DEFAULTS[precision]
        assert limits.max_kl_mean is not None and limits.max_perplexity_ratio is not None
        assert limits.min_agreement is not None and limits.min_text_agreement is not None


def test_changes_replace_defaults_by_name() -> None:
    changed = thresholds_for("int8", {"max_kl_mean": 0.5, "max_mismatches": 3.0})
    assert (changed.max_kl_mean, changed.max_mismatches) == (0.5, 3)
    assert changed.max_kl_p99 == DEFAULTS["int8"].max_kl_p99
    assert ExportConfig("a", Path("b"), precision="int8", thresholds={"max_kl_mean": 0.5}).limits.max_kl_mean == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl": 1.0}, "threshold 'kl' is unknown; expected one of tie_logit_gap, max_mismatches"),
        ({"max_kl_mean": -1.0}, "max_kl_mean has value -1.0; expected a number ≥ 0"),
        ({"max_kl_mean": math.nan}, "expected a number ≥ 0"),
        ({"min_agreement": 95.0}, "min_agreement has value 95.0; expected a fraction from 0 to 1"),
    ],
)
def test_a_bad_threshold_is_named(changes: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        ExportConfig("a", Path("b"), thresholds=changes)
    assert message in str(caught.value)


def test_thresholds_are_read_from_text() -> None:
    assert parse_threshold("max_kl_mean=0.01") == ("max_kl_mean", 0.01)
    with pytest.raises(InvalidConfig, match="has no number"):
        parse_threshold("max_kl_mean=little")
    with pytest.raises(InvalidConfig, match="has no '='"):
        parse_threshold("max_kl_mean")


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Thresholds) if f.name != "tie_logit_gap"])
def test_every_limit_can_fail(name: str) -> None:
    limits = Thresholds(tie_logit_gap=0, **{name: 0.5})
    worse, better = (0.4, 0.6) if name.startswith("min_") else (0.6, 0.4)
    assert [found.passed for value in (worse, better, 0.5) for found in check(limits, {name: value})] == [
        False,
        True,
        True,
    ]
    assert not check(limits, {name: None})[0].passed, "what could not be measured has not been proven"
    assert not check(limits, {name: math.nan})[0].passed
    assert check(Thresholds(tie_logit_gap=0), {name: worse})[0].passed, "no limit, only reported"


@pytest.mark.parametrize("max_len", [2, 7, 512, 4096])
def test_held_out_text_is_cut_to_the_context(max_len: int) -> None:
    windows = windows_of(lambda text: list(text.encode()), read_text(None), max_len)
    assert all(2 <= len(window) <= max_len for window in windows)
    assert 1 < sum(map(len, windows)) <= MAX_TOKENS
    assert windows_of(lambda text: [5], "x", max_len) == []


def test_a_text_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin1").write_bytes("größer".encode("latin1"))
    with pytest.raises(InvalidConfig, match="latin1 as UTF-8"):
        read_text(tmp_path / "latin1")
    with pytest.raises(InvalidConfig, match="eval_text has value '/nowhere'; expected an existing text file"):
        ExportConfig("a", Path("b"), eval_text=Path("/nowhere"))
