"""What the serving benchmark asks, counts and writes, without an engine."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest

from benchmarks.engines import ENGINES
from benchmarks.engines.closed_loop import Answer, ClosedLoop
from benchmarks.serving import figures, report, targets
from benchmarks.serving.__main__ import SCENARIOS, SERVED
from benchmarks.serving.long_prompt import LEAD, watched
from benchmarks.serving.soak import Memory, settled
from benchmarks.serving.soak_requests import KINDS, requests
from benchmarks.serving.workload import LONGEST, SHORTEST, Workload

pytestmark = pytest.mark.unit


def answer(sent_s: float, *times_s: float) -> Answer:
    return Answer(sent_s, list(range(len(times_s))), list(times_s))


def engine(label: str, precision: str, **tokens_per_s: float) -> dict[str, Any]:
    spread = {"p50": 10.0, "p95": 20.0}
    clients = {
        n.removeprefix("n"): {
            "tokens_per_s": value,
            "ttft_ms": spread,
            "itl_ms": spread,
            "rounds_tokens_per_s": [value],
        }
        for n, value in tokens_per_s.items()
    }
    same = {"answers": 2, "equal_answers": 1, "tokens": 8, "equal_tokens": 7}
    facts = {"label": label, "precision": precision, "served_by": "a way", "peak_rss_bytes": 2**30, "agreement": same}
    return {**facts, "clients": clients}


@pytest.fixture
def engines() -> dict[str, dict[str, Any]]:
    found = {
        "llmos-fp32": engine("llmos", "fp32", n1=40.0, n8=240.0),
        "llmos-int8": engine("llmos", "int8", n1=100.0, n8=400.0),
        "bare-fp32": engine("bare ONNX Runtime", "fp32", n1=42.0, n8=300.0),
        "slow-fp32": engine("slow", "fp32", n1=20.0, n8=100.0),
        "quick-fp32": engine("quick", "fp32", n1=32.0, n8=80.0),
        "small-int4": engine("small", "int4", n1=120.0, n8=200.0),
    }
    figures.add_ratios(found, "llmos")
    return found


def test_percentiles_are_numpys():
    values = [5.0, 1.0, 9.0, 3.0, 3.0, 12.0]
    for percent in (0, 5, 50, 95, 100):
        assert figures.percentile(values, percent) == pytest.approx(np.percentile(values, percent))
    assert figures.percentile([7.0], 95) == 7.0


def test_a_run_counts_all_tokens_from_the_first_request_to_the_last_token():
    found = figures.of_run([answer(10.0, 10.5, 10.6, 10.7), answer(10.2, 11.2, 11.3, 12.0)])
    assert found["tokens_per_s"] == pytest.approx(6 / 2.0)
    assert found["ttft_ms"]["p50"] == pytest.approx(750)
    assert found["itl_ms"]["p50"] == pytest.approx(100)
    assert found["itl_ms"]["p95"] == pytest.approx(1e3 * np.percentile([0.1, 0.1, 0.1, 0.7], 95))


def test_a_disturbed_round_does_not_move_the_medians():
    runs = [figures.of_run([answer(0.0, first, first + 0.1)]) for first in (1.0, 1.1, 50.0)]
    found = figures.over_rounds(runs)
    assert found["ttft_ms"]["p95"] == pytest.approx(1100)
    assert found["tokens_per_s"] == pytest.approx(2 / 1.2)
    assert len(found["rounds_tokens_per_s"]) == 3


def test_agreement_counts_tokens_up_to_the_first_difference():
    assert figures.agreement([[1, 2, 3], [1, 9, 3], [1, 2]], [[1, 2, 3], [1, 2, 3], [1, 2, 3]]) == {
        "answers": 3,
        "equal_answers": 1,
        "tokens": 9,
        "equal_tokens": 6,
    }


def test_smaller_weights_are_compared_with_ours_in_int8(engines):
    assert engines["slow-fp32"]["clients"]["1"]["ratio"] == 0.5
    assert engines["small-int4"]["clients"]["1"]["ratio"] == pytest.approx(1.2)
    del engines["llmos-int8"]
    figures.add_ratios(engines, "llmos")
    assert engines["small-int4"]["clients"]["1"]["ratio"] is None


def test_targets_name_the_best_peer_of_each_number_of_clients(engines):
    found = {(entry["title"], entry["clients"]): entry for entry in targets.reached(engines)}
    beside = {clients: found["fp32 beside the best fp32 peer", clients] for clients in ("1", "8")}
    assert (beside["1"]["other"], beside["1"]["ratio"], beside["1"]["is_met"]) == ("quick-fp32", 1.25, True)
    assert (beside["8"]["other"], beside["8"]["ratio"], beside["8"]["is_met"]) == ("slow-fp32", 2.4, True)
    assert not found["int8 beside the best quantized peer", "1"]["is_met"]
    assert found["fp32 through Triton beside bare steps", "8"]["ratio"] == pytest.approx(0.8)
    assert not any("int8 through" in title for title, _ in found)


def test_a_result_is_read_back_as_written_and_has_a_line_per_engine(engines, tmp_path):
    document = {
        "kind": "Serving",
        "date": "2026-01-31",
        "machine": {"cpu": "a CPU"},
        "model": {"name": "a-model"},
        "settings": {"clients": [1, 8]},
        "versions": {"llmos": "1.0"},
        "absent": {"other-int8": "it has no wheel"},
        "notes": ["A note."],
        "tables": report.load_tables(engines, ["1", "8"]),
        "engines": engines,
    }
    json_path, markdown_path = report.write(document, tmp_path / "new", "serving-2026-01-31")
    assert json.loads(json_path.read_text(encoding="utf-8")) == document
    text = markdown_path.read_text(encoding="utf-8")
    assert "| small | int4 | a way | 120 | 1.20 | 200 | 0.50 | 1/2 | 7/8 | 1024 |" in text
    for words in (
        "a CPU",
        "a-model",
        "llmos 1.0",
        "**other-int8**: it has no wheel",
        "A note.",
        "## Latency, 1 client\n",
    ):
        assert words in text
    for each in document["tables"]:
        assert {len(line) for line in each["lines"]} == {len(each["columns"])}


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (True, "yes"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1234"), (3, "3")]
)
def test_a_cell_has_the_digits_that_mean_something(value, text):
    assert report.cell(value) == text


def test_every_wave_has_the_same_lengths_and_no_prompt_comes_twice():
    workload = Workload(vocab_size=5000, num_clients=8, waves=3, num_new=4)
    waves = [workload.prompts[first : first + 8] for first in (0, 8, 16)]
    lengths = [sorted(map(len, wave)) for wave in waves]
    assert lengths[0] == lengths[1] == lengths[2]
    assert SHORTEST <= lengths[0][0] < lengths[0][-1] <= LONGEST
    assert len(set(map(tuple, workload.prompts))) == 24
    assert workload.prompts == Workload(5000, 8, 3, 4).prompts != Workload(5000, 8, 3, 4, seed=1).prompts
    assert [len(prompt) for prompt in Workload(5000, 1, 1, 4).prompts] == [(SHORTEST + LONGEST) // 2]
    assert not set(map(tuple, workload.warm_up.prompts)) & {tuple(prompt[:8]) for prompt in workload.prompts}


def test_a_client_sends_its_next_request_when_its_last_is_answered():
    clock = itertools.count()
    loop = ClosedLoop([[1], [2], [3]], num_clients=2, num_new=2, clock=lambda: float(next(clock)))
    assert [arrival.index for arrival in loop.arrivals()] == [0, 1]
    assert not list(loop.arrivals())
    assert not loop.token(0, 7)
    assert not loop.token(1, 8, time_s=0.5)
    assert loop.token(1, 9)
    assert [arrival.prompt for arrival in loop.arrivals()] == [[3]]
    assert loop.token(0, 7) and not loop.token(2, 5) and not loop.is_done
    assert loop.token(2, 6) and loop.is_done
    assert [found.tokens for found in loop.answers] == [[7, 7], [8, 9], [5, 6]]
    assert [found.sent_s for found in loop.answers] == [0.0, 1.0, 4.0]
    assert loop.answers[1].times_s == [0.5, 3.0]


def test_gaps_are_watched_only_while_all_streams_run():
    steady = [0.1 * k for k in range(1, LEAD + 11)]
    late = [time_s + 0.35 for time_s in steady]
    stalled = [*steady[: LEAD + 5], *(time_s + 1.0 for time_s in steady[LEAD + 5 :])]
    undisturbed = watched([Answer(0.0, [], steady), Answer(0.0, [], late)], None)
    assert undisturbed["all_p95"] == pytest.approx(100)
    begin_s = stalled[LEAD + 4]
    long_prompt = Answer(begin_s + 0.01, [0], [begin_s + 1.05])
    found = watched([Answer(0.0, [], stalled)], long_prompt)
    assert (found["all_p50"], found["all_max"]) == (pytest.approx(100), pytest.approx(1100))
    assert found["meanwhile_p50"] == pytest.approx(1100)
    assert found["ttft_ms"] == pytest.approx(1040)


def test_the_soak_asks_every_kind_equally_often_with_prompts_of_their_own():
    found = requests(vocab_size=1000, count=3 * len(KINDS))
    assert [name for name, _ in found[: len(KINDS)]] == list(KINDS)
    assert len({call.input_ids for _, call in found}) == len(found)
    assert len({call.sampling["seed"] for _, call in found}) == len(found)
    assert {call.cancel_after > 0 for name, call in found if name == "cancelled"} == {True}
    assert found == requests(1000, 3 * len(KINDS))


class Stub:
    """A process that grows by one MiB whenever it is looked at, until it has ``limit``."""

    def __init__(self, limit_mib: int) -> None:
        self.rss, self._limit = 0, limit_mib * 2**20

    def memory_info(self) -> Stub:
        self.rss = min(self.rss + 2**20, self._limit)
        return self


def test_memory_that_is_taken_once_is_no_growth():
    flat, leaking = Memory(Stub(3), 100), Memory(Stub(100), 100)  # type: ignore[arg-type]
    for count in range(1, 101):
        flat.mark(count)
        leaking.mark(count)
    assert (len(flat.rss_bytes), flat.growth_bytes) == (11, 0)
    assert leaking.growth_bytes == 7 * 2**20


def test_a_cancelled_request_may_take_a_moment_to_go():
    left = iter([2.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    assert settled(lambda name: next(left)) == {"running": 0.0, "waiting": 0.0}


def test_every_scenario_and_every_served_engine_has_a_module():
    from importlib.util import find_spec

    for name in SCENARIOS:
        assert find_spec(f"benchmarks.serving.{name.replace('-', '_')}")
    assert {"llmos-fp32", "bare-int8", "transformers-continuous"} <= set(SERVED)
    assert all(not spec.files or spec.files in ENGINES for spec in ENGINES.values())
