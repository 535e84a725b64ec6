"""Every architecture that SUPPORTED.md calls equal is: exported from a tiny random model and compared with generate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from exporters.matrix import EQUAL, REFUSED, Row, examine_all, line_of, lines_by_type
from exporters.tiny import architectures

pytestmark = pytest.mark.integration

LINES = lines_by_type()
EXPORTED = [model_type for model_type, line in LINES.items() if " | equal | " in line]
FIRST_OF_NODES = {LINES[model_type].split("|")[5]: model_type for model_type in reversed(EXPORTED)}
"""Nodes of a layer, as traced and as fused → the first architecture that has these."""
LARGE = ("deepseek_v4", "hrm_text")
"""However few layers they have, tracing them takes as long as ten others."""
REFUSALS = {
    "olmo_hybrid": "lets tokens see each other",
    "bloom": "does not use transformers' attention interface",
    "deepseek_v32": "hands indices to its attention",
    "doge": "builds or changes its attention mask itself",
    "falcon": "does not use transformers' attention interface",
    "gptj": "does not use transformers' attention interface",
    "mamba": "takes no position_ids",
}


class Rows:
    """Rows of the matrix as its two worker processes finish them, in the order of the tests that ask for them."""

    def __init__(self, model_types: Sequence[str]) -> None:
        self._coming: Iterator[Row] = examine_all(model_types)
        self._done: dict[str, Row] = {}

    def of(self, model_type: str) -> Row:
        while model_type not in self._done:
            row = next(self._coming)
            self._done[row.model_type] = row
        return self._done[model_type]


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> Rows:
    """Of the architectures whose tests were selected."""
    callspecs = [getattr(item, "callspec", None) for item in request.session.items if item.fspath == request.fspath]
    return Rows([callspec.params["model_type"] for callspec in callspecs if callspec is not None])


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=() if name in {*FIRST_OF_NODES.values()} - {*LARGE} else pytest.mark.sibling)
        for name in EXPORTED
    ],
)
def test_greedy_tokens_equal_generate_and_the_matrix_says_so(model_type: str, rows: Rows) -> None:
    row = rows.of(model_type)
    assert row.outcome == EQUAL, row.reason
    assert line_of(row) == LINES[model_type]


@pytest.mark.parametrize("model_type", REFUSALS)
def test_a_refusal_names_the_architecture_and_the_reason(model_type: str, rows: Rows) -> None:
    row = rows.of(model_type)
    assert row.outcome == REFUSED
    assert REFUSALS[model_type] in row.reason
    assert line_of(row) == LINES[model_type]


def test_the_matrix_has_a_row_for_every_architecture() -> None:
    assert list(LINES) == architectures()


def test_at_least_45_architectures_are_exported_and_none_silently_differs() -> None:
    assert len(EXPORTED) >= 45
    assert not [line for line in LINES.values() if "differs" in line]
