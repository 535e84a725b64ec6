"""The door of an export: settings, the output folder, and the prompts a certificate uses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from exporters import ExportConfig
from exporters.errors import InvalidConfig
from exporters.prompts import make_prompts

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_len": 1}, "max_model_len has value 1; expected a whole number ≥ 2"),
        ({"max_num_seqs": 0}, "max_num_seqs has value 0; expected a whole number ≥ 1"),
        ({"precision": "int3"}, "precision has value 'int3'; expected one of fp32, fp16, bf16, int8, int4"),
    ],
)
def test_a_bad_setting_is_named_with_what_is_allowed(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        ExportConfig("checkpoint", Path("out"), **settings)
    assert str(caught.value) == message


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
