"""What a benchmark computes and writes, without measuring anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import exporting, results
from benchmarks.bench import Failed, rotated
from benchmarks.engines import ENGINES, OURS, REFERENCE, Generation, Prompts, stepwise
from benchmarks.environment import OPTIONAL, REQUIREMENTS, requirements_in
from benchmarks.export import described
from benchmarks.worker import measure

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[3]


def sample(one_row_ms: float, eight_rows_ms: float, prefill_ms: float) -> dict[str, Any]:
    return {
        "decode_ms": {"1": one_row_ms, "8": eight_rows_ms},
        "prefill_ms": prefill_ms,
        "peak_rss_bytes": 3 * 2**20,
    }


def engine(label: str, precision: str, *samples: dict[str, Any]) -> dict[str, Any]:
    return {
        "label": label,
        "precision": precision,
        "versions": {label: "1.0"},
        "agreement": results.agreement([(0, 0.0), (3, 0.2)]),
        **results.summarise(samples, num_prefill_tokens=512),
    }


@pytest.fixture
def document() -> results.Document:
    engines = {
        "llmos-fp32": engine(
            "llmos", "fp32", sample(20.0, 40.0, 512.0), sample(90.0, 41.0, 600.0), sample(22, 39.0, 500)
        ),
        "other-fp32": engine("other", "fp32", sample(44.0, 80.0, 256.0)),
        "other-int4": engine("other", "int4", sample(11.0, 20.0, 1024.0)),
    }
    results.add_ratios(engines, OURS)
    return {
        "format": results.FORMAT,
        "date": "2026-01-31",
        "machine": {"cpu": "a CPU"},
        "model": {"name": "a-model"},
        "settings": {"rounds": 3, "rows": [1, 8], "context": 200, "prefill": 512, "num_threads": 2},
        "engines": engines,
        "absent": {"another-int8": "it has no wheel"},
    }


def test_a_round_that_was_disturbed_does_not_move_the_median_but_shows_in_the_range(document):
    found = document["engines"]["llmos-fp32"]["decode"]["1"]
    assert (found["median_ms"], found["min_ms"], found["max_ms"]) == (22, 20.0, 90.0)


def test_tokens_per_second_count_every_row_and_the_whole_prompt(document):
    llmos = document["engines"]["llmos-fp32"]
    assert llmos["decode"]["8"]["tokens_per_s"] == pytest.approx(8 / 0.040)
    assert llmos["prefill"]["tokens_per_s"] == pytest.approx(512 / 0.512)


def test_engines_are_compared_within_one_precision_only(document):
    engines = document["engines"]
    assert engines["other-fp32"]["decode"]["1"]["ratio"] == 2.0
    assert engines["other-fp32"]["prefill"]["ratio"] == 0.5
    assert engines["llmos-fp32"]["decode"]["8"]["ratio"] == 1.0
    assert engines["other-int4"]["decode"]["1"]["ratio"] is None


def test_agreement_tells_a_low_precision_from_a_mistake():
    near = results.agreement([(0, 0.0), (2, 0.1), (0, 0.0), (5, 0.3)])
    assert near == {"tokens": 4, "equal_tokens": 2, "median_rank": 1.0, "max_logit_gap": 0.3}
    with pytest.raises(Failed, match="fp32"):
        described("ctranslate2-fp32", {"versions": {}}, near, vocab_size=1000)
    assert described("ctranslate2-int8", {"versions": {}}, near, vocab_size=1000)["agreement"] == near
    with pytest.raises(Failed, match="little to do"):
        described("ctranslate2-int8", {"versions": {}}, results.agreement([(500, 3.0)] * 3), vocab_size=1000)


def test_a_table_has_a_line_per_engine_and_a_cell_per_title(document):
    titles, lines = results.table(document)
    assert [line[:2] for line in lines] == [["llmos", "fp32"], ["other", "fp32"], ["other", "int4"]]
    assert {len(line) for line in lines} == {len(titles)}
    assert lines[1][titles.index("n=8 ms")] == "80.0"
    assert lines[2].count("–") == 3


def test_results_are_read_back_as_written_and_name_who_is_absent_and_why(document, tmp_path):
    json_path, markdown_path = results.write(document, tmp_path / "new", "export-2026-01-31")
    assert json.loads(json_path.read_text(encoding="utf-8")) == document
    text = markdown_path.read_text(encoding="utf-8")
    assert "| other | fp32 | 44.0 | 23 | 2.00 |" in text
    assert "| llmos-fp32 | 20.0–90.0 |" in text
    for words in ("2026-01-31", "a CPU", "a-model", "llmos 1.0", "**another-int8**: it has no wheel"):
        assert words in text


def test_the_cost_of_an_export_is_shown_per_step_with_and_without_its_proof(document):
    steps = [(0.0, "start"), (1.0, "load"), (1.5, "certify")]
    samples = [(0.5, 100), (1.2, 300), (1.4, 200), (2.0, 900)]
    per_step = exporting.per_step(steps, 4.0, samples)
    assert [(s["step"], s["seconds"], s["peak_rss_bytes"]) for s in per_step] == [
        ("start", 1.0, 100),
        ("load", 0.5, 300),
        ("certify", 2.5, 900),
    ]
    export = {"steps": per_step, "seconds": 4.0, "peak_rss_bytes": 900, "checkpoint_bytes": 200, "passed": True}
    _, lines = results.export_table(document | {"exports": {"fp32": export}})
    assert [[line[1], line[2], line[4]] for line in lines[-2:]] == [
        ["all but certify", "1.5", "1.50"],
        ["all; certificate passed", "4.0", "4.50"],
    ]


def test_warm_up_and_the_first_prefill_are_not_measured():
    """Two slow warm-up steps, then 1 ms per row; the first prefill of a prompt takes a second, later ones 5 ms."""
    prefills = []

    def generate(prompts: Prompts, num_new: int) -> Generation:
        if num_new == 1:
            prefills.append(len(prompts[0]))
            return Generation([[0]], [0.0, 1.0 if len(prefills) == 1 else 0.005])
        assert {len(prompt) for prompt in prompts} == {10 - 2}
        marks = [0.0, 7.0, 8.0, 9.0]
        while len(marks) < num_new + 1:
            marks.append(marks[-1] + 0.001 * len(prompts))
        return Generation([], marks)

    task = {
        "warmup_steps": 2,
        "steps": 3,
        "vocab_size": 100,
        "rows": [1, 4],
        "context": 10,
        "prefill": 6,
        "prefills": 2,
    }
    found = measure(generate, task)
    assert found["decode_ms"] == {"1": pytest.approx(1.0), "4": pytest.approx(4.0)}
    assert found["prefill_ms"] == pytest.approx(5.0)
    assert prefills == [6, 6, 6]


def test_a_stepwise_engine_gives_each_row_its_own_tokens_and_a_mark_per_token():
    generation = stepwise(lambda prompts: [p[0] for p in prompts], lambda tokens: [t + 1 for t in tokens])(
        [[10], [20]], 3
    )
    assert generation.tokens == [[10, 11, 12], [20, 21, 22]]
    assert len(generation.marks_s) == 4
    assert generation.marks_s == sorted(generation.marks_s)


def test_every_round_begins_with_another_engine():
    rounds = [rotated(["a", "b", "c"], number) for number in range(4)]
    assert [names[0] for names in rounds] == ["a", "b", "c", "a"]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)


def test_every_engine_has_a_module_and_every_peer_comes_from_the_requirements():
    required = [line.partition("==")[0] for p in (REQUIREMENTS, OPTIONAL) for line in requirements_in(p.read_text())]
    assert ENGINES[REFERENCE].precision == "fp32"
    for spec in ENGINES.values():
        assert (ROOT / "benchmarks" / "engines" / f"{spec.module}.py").exists()
        assert not spec.peer or set(spec.packages) <= set(required)
        assert all(list(ROOT.glob(pattern)) for pattern in spec.sources)
