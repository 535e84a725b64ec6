"""The tables that end an export, a plan and a verification."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from control_plane.launcher.console import Screen
from control_plane.launcher.proof_report import export_table, plan_table, size, verification_table
from control_plane.subprocesses import ChildEvent

pytestmark = pytest.mark.unit

SUMMARY = {
    "precision": "int8",
    "num_prompts": 17,
    "num_equal": 16,
    "num_ties": 1,
    "num_mismatches": 0,
    "num_tokens_compared": 1050,
    "agreement": 0.9912,
    "text_agreement": 0.98,
    "max_logit_difference": 0.0391,
    "mean_logit_difference": 0.002,
    "kl_mean": 0.0013,
    "kl_p99": 0.02,
    "perplexity_original": 12.3456,
    "perplexity_ratio": 1.0042,
    "prefill_tokens_per_s": 1100.0,
    "decode_tokens_per_s": 125.4,
    "peak_rss_bytes": 3 << 30,
    "export_peak_rss_bytes": 1300 << 20,
    "failed": [],
}
EXPORT = {
    "passed": True,
    "certificate": SUMMARY,
    "size_bytes": 140 << 20,
    "folder": "/models/chat/1",
    "digest": "0123abcd",
    "timings": {"check": {"seconds": 0.01}, "trace": {"seconds": 20.5}, "certify": {"seconds": 10.25}},
    "graph": {
        "traced": {"num_nodes": 1254, "num_nodes_per_layer": 48},
        "fused": {"num_nodes": 339, "num_nodes_per_layer": 11},
    },
}


def shown(table: Any) -> str:
    stream = io.StringIO()
    Console(file=stream, width=160).print(table)
    return stream.getvalue()


def test_an_export_ends_with_its_certificate() -> None:
    text = shown(export_table(EXPORT))
    for words in (
        "passed",
        "16 of 17 equal, 1 ties, 0 mismatches (1,050 tokens)",
        "99.12% of greedy tokens, 98.00% on text",
        "max difference 0.039",
        "perplexity 12.35 × 1.0042",
        "125.4 tokens/s decode",
        "3.0 GiB peak of the engine, 1.3 GiB of this run",
        "140 MiB in int8",
        "48 → 11 nodes a layer, 1,254 → 339 in all",
        "30.8 s: trace 20.5, certify 10.2",
        "/models/chat/1",
        "0123abcd",
    ):
        assert words in text


def test_a_failed_certificate_names_what_failed_and_a_missing_one_is_said() -> None:
    failed = {**EXPORT, "passed": False, "certificate": {**SUMMARY, "failed": ["max_kl_mean", "min_agreement"]}}
    assert "FAILED: max_kl_mean, min_agreement" in shown(export_table(failed))
    assert "none was made" in shown(export_table({"passed": None, "folder": "x", "digest": "y"}))


def test_a_verification_shows_both_certificates_or_why_there_is_one() -> None:
    repetition = {"num_prompts": 17, "num_equal": 17, "num_ties": 0, "num_mismatches": 0, "max_logit_difference": 0.0}
    both = {"passed": True, "original": "/ckpt", "recorded": SUMMARY, "found": SUMMARY, "digest": "0123"}
    text = shown(verification_table({**both, "repetition": repetition}))
    assert "17 of 17 prompts give the recorded tokens" in text
    assert text.count("16 of 17 equal") == 2
    alone = {**both, "passed": False, "original": None, "reason": "it is not on this machine", "found": {}}
    text = shown(verification_table({**alone, "repetition": repetition}))
    assert "FAILED" in text and "not compared: it is not on this machine" in text


def test_a_plan_is_shown_in_units_of_people() -> None:
    plan = {
        "name": "m135",
        "architecture": "LlamaForCausalLM",
        "kind": "encoder_decoder",
        "num_parameters": 134_515_008,
        "num_layers": 30,
        "precision": "int8",
        "device": "cpu",
        "folder_bytes": 140 << 20,
        "max_model_len": 2048,
        "max_source_len": 512,
        "cache_bytes_per_row": 90 << 20,
        "cache_bytes": 2 << 30,
        "max_num_seqs": 32,
        "export_peak_bytes": 2 << 30,
        "serving_bytes": 3 << 30,
        "decode_step_s": 0.0075,
        "bytes_per_decode_step": 135 << 20,
        "bandwidth_bytes_per_s": 18.3e9,
        "lora_bytes": 35 << 20,
        "ignored_settings": {"min_length": 56},
    }
    text = shown(plan_table(plan))
    for words in ("134,515,008 in 30 layers", "encoder–decoder", "at least 7.5 ms", "18.3 GB/s", "35 MiB", "of 512"):
        assert words in text
    assert "the checkpoint asks generate for min_length 56" in text
    assert "asks generate" not in shown(plan_table({**plan, "ignored_settings": {}}))


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(12, "12 bytes"), (2048, "2.0 KiB"), (538 << 20, "538 MiB"), (1 << 30, "1.0 GiB")]
)
def test_sizes_are_short(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text


def test_steps_that_are_measured_are_shown_when_they_are_over() -> None:
    stream = io.StringIO()
    screen = Screen(Console(file=stream, width=160))
    previous = {"step": "load", "seconds": 6.04, "peak_rss_bytes": 947 << 20}
    with screen.child("export") as on_event:
        on_event(ChildEvent("step", {"step": "load", "rss_bytes": 1}))
        on_event(ChildEvent("step", {"step": "trace", "rss_bytes": 1, "previous": previous}))
        on_event(ChildEvent("step", {"step": "plain"}))
    lines = stream.getvalue().splitlines()
    assert lines[1].split() == ["load", "6.0", "s", "peak", "947", "MiB"]
    assert lines[2].split() == ["plain"]
