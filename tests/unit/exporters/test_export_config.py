"""The door of an export: settings, the output folder, and the prompts a certificate uses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from exporters import ExportConfig
from exporters.config import parse_setting
from exporters.errors import InvalidConfig
from exporters.prompts import make_prompts

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_len": 1}, "max_model_len has value 1; expected a whole number ≥ 2"),
        ({"max_num_seqs": 0}, "max_num_seqs has value 0; expected a whole number ≥ 1"),
        ({"precision": "int3"}, "precision has value 'int3'; expected one of fp32, fp16, bf16, int8, int4"),
        ({"engine": {"max_num_seqs": 4}}, "engine setting 'max_num_seqs' cannot be set; it is an option of its own"),
        ({"engine": {"deterministic": 1}}, "engine setting deterministic has value 1; expected true or false"),
        (
            {"engine": {"cuda_graphs": True}},
            "engine setting cuda_graphs is true, but device has value 'cpu'; expected 'cuda'",
        ),
    ],
)
def test_a_bad_setting_is_named_with_what_is_allowed(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        ExportConfig("checkpoint", Path("out"), **settings)
    assert str(caught.value) == message


def test_an_unknown_engine_setting_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidConfig, match=r"engine setting 'beams' cannot be set; expected max_num_batched_tokens, "):
        ExportConfig("checkpoint", Path("out"), engine={"beams": 4})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("deterministic=false", ("deterministic", False)),
        ("stream_interval=4", ("stream_interval", 4)),
        ("x=a=b", ("x", "a=b")),
    ],
)
def test_an_engine_setting_is_a_name_and_json(text: str, expected: tuple[str, Any]) -> None:
    assert parse_setting(text) == expected


def test_an_engine_setting_without_a_value_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="'deterministic' has no '='; expected NAME=VALUE"):
        parse_setting("deterministic")


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, exporters; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("max_model_len", [2, 16, 128, 1024, 4096])
def test_prompts_fit_the_context_and_are_at_least_sixteen(max_model_len: int) -> None:
    prompts = make_prompts(lambda text: list(text.encode()), 256, max_model_len, 512, sliding_window=None)
    assert len(prompts) >= 16
    assert len({prompt.name for prompt in prompts}) == len(prompts)
    assert min(len(prompt.ids) for prompt in prompts) == 1
    assert all(1 <= len(prompt.ids) <= max_model_len - prompt.num_new_tokens for prompt in prompts)
    assert all(0 <= token < 256 for prompt in prompts for token in prompt.ids)


def test_prompts_reach_past_one_prefill_step_and_past_the_window() -> None:
    prompts = make_prompts(lambda text: list(text.encode()), 256, 4096, 512, sliding_window=1024)
    lengths = {prompt.name: len(prompt.ids) for prompt in prompts}
    assert lengths["long_text"] > 512
    assert lengths["past_window"] > 1024


def test_a_tokenizer_that_knows_no_text_still_gives_sixteen_prompts() -> None:
    assert len(make_prompts(lambda text: [], 256, 128, 512, sliding_window=None)) >= 16
