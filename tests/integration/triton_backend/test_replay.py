"""An event log is enough to do everything again, step by step; and a difference is found at once."""

from __future__ import annotations

import contextlib
import json
import random

import pytest
from transformers import AutoTokenizer

from triton_backend.event_log import EventLog
from triton_backend.loading import load_engine
from triton_backend.replay import replay

from .conftest import Client

pytestmark = pytest.mark.integration


@pytest.fixture
def log(version, checkpoint, tmp_path):
    """What happened in an engine with all kinds of requests in it."""
    path = tmp_path / "events.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        engine, _ = load_engine(version, events=EventLog(stream))
        client = Client(engine, AutoTokenizer.from_pretrained(checkpoint))
        draw = random.Random(3)
        kinds = [{}, {"temperature": 1.0}, {"beam_width": 3}, {"n": 2, "temperature": 1.0, "seed": 4}, {"priority": -1}]
        answers = [
            client.submit(
                [7] * (i % 30) + draw.choices(range(1, 400), k=1 + i), max_tokens=5 + i, stop=["q"], **kinds[i % 5]
            )
            for i in range(30)
        ]
        answers[4].gone = answers[20].gone = True
        grammar = {"structured_outputs": {"regex": "[a-z]{1,9}"}}
        answers.append(client.submit("The", max_tokens=20, temperature=1.0, **grammar))
        for answer in answers:
            answer.last()
        engine.stop()
    return path


def test_every_plan_is_made_again(log, version):
    engine, _ = load_engine(version, is_started=False)
    num_steps, difference = replay(engine, log)
    assert difference is None
    assert num_steps == sum('"planned"' in line for line in log.read_text().splitlines()) > 20
    assert not engine._scheduler.has_work


def test_what_a_step_ended_by_itself_is_not_ended_again(version, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "triton_backend.engine._grammar_error", lambda state: "too hard" if len(state.lead.output_ids) > 3 else None
    )
    path = tmp_path / "events.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        engine, _ = load_engine(version, events=EventLog(stream))
        client = Client(engine, AutoTokenizer.from_pretrained(checkpoint))
        assert client.ask([5, 6], max_tokens=9, ignore_eos=True).error == "INVALID_ARG: too hard"
        engine.stop()
    engine, _ = load_engine(version, is_started=False)
    assert replay(engine, path) == (4, None)


def test_a_log_on_a_full_disk_ends_and_the_engine_goes_on(version, checkpoint):
    with open("/dev/full", "w", encoding="utf-8") as stream:
        engine, _ = load_engine(version, events=EventLog(stream))
        client = Client(engine, AutoTokenizer.from_pretrained(checkpoint))
        assert client.ask([5, 6], max_tokens=9, ignore_eos=True).error is None
        engine.stop()
        with contextlib.suppress(OSError):
            stream.close()


def test_the_first_difference_is_named(log, version):
    lines = log.read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if '"planned"' in line and json.loads(line)["step"] == 7)
    event = json.loads(lines[place])
    lines[place] = json.dumps({**event, "copies": event["copies"] + 1})
    log.write_text("\n".join(lines))
    engine, _ = load_engine(version, is_started=False)
    num_steps, difference = replay(engine, log)
    assert num_steps == 7
    assert difference == f"step 7: copies were {event['copies'] + 1}, now {event['copies']}"
