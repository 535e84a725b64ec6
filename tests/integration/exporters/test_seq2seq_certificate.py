"""The certificate of an encoder–decoder: its sources go through the real engine, its tokens through the original."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from exporters import ExportConfig
from exporters.certificate import certify
from exporters.checkpoint import open_checkpoint
from exporters.events import Progress
from exporters.passages import passage_of
from exporters.prompts import Prompt
from exporters.seq2seq import measure
from exporters.seq2seq_config import seq2seq_version_config
from exporters.version import write_tokenizer
from tests.integration.exporters.seq2seq_loop import MAX_SOURCE_LEN, export_graphs
from tests.integration.exporters.test_seq2seq import BART_SIZES, T5_SIZES
from triton_backend.config import VersionConfig

pytestmark = pytest.mark.integration

MAX_MODEL_LEN, FORCED_ID = 48, 7
FAMILIES = {"bart": {**BART_SIZES, "forced_bos_token_id": FORCED_ID}, "t5": T5_SIZES}


@pytest.fixture(scope="module")
def make(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """(checkpoint, version folder without certificate) of a family."""

    def make(name: str) -> tuple[Path, Path]:
        torch.manual_seed(0)
        model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(name, **FAMILIES[name])).eval().float()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
        folder, out = tmp_path_factory.mktemp(name), tmp_path_factory.mktemp(f"{name}-version")
        if name == "bart":
            model.generation_config.forced_bos_token_id = FORCED_ID
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        checkpoint, shape = open_checkpoint(str(folder)), measure(model)
        asked = ExportConfig(
            str(folder), out, max_model_len=MAX_MODEL_LEN, max_source_len=MAX_SOURCE_LEN, max_num_seqs=4
        )
        seq2seq_version_config(asked, checkpoint, model, shape, 64).write(out)
        export_graphs(model, out)
        write_tokenizer(out, tokenizer, checkpoint, shape.vocab_size)
        return folder, out

    return make


def proof(folder: Path, checkpoint: Path) -> dict[str, Any]:
    certificate = certify(folder, open_checkpoint(str(checkpoint)), None, Progress(lambda event: None, ("certify",)))
    json.dumps(certificate, allow_nan=False)
    return certificate


@pytest.mark.parametrize("name", FAMILIES)
def test_sources_give_the_original_s_tokens(name: str, make: Callable[[str], tuple[Path, Path]]) -> None:
    checkpoint, out = make(name)
    certificate = proof(out, checkpoint)
    assert certificate["passed"] is True, certificate["checks"]
    assert certificate["kind"] == "encoder_decoder"
    assert certificate["summary"]["num_equal"] + certificate["summary"]["num_ties"] >= 16
    assert certificate["generate"]["num_equal"] == 2
    assert certificate["text"]["num_tokens"] > 100
    assert max(result["num_prompt_tokens"] for result in certificate["tokens"]) == MAX_SOURCE_LEN
    forced = [result["token_ids"][0] == FORCED_ID for result in certificate["tokens"]]
    assert all(forced) if name == "bart" else not all(forced)

    other = AutoModelForSeq2SeqLM.from_pretrained(checkpoint)
    other.get_encoder().get_input_embeddings().weight.data *= 1.5
    other.save_pretrained(checkpoint)
    assert proof(out, checkpoint)["passed"] is False


def test_a_forced_token_is_no_choice_and_is_not_compared(make: Callable[[str], tuple[Path, Path]]) -> None:
    _, out = make("bart")
    config = VersionConfig.read(out)
    passage = passage_of(config, Prompt("p", (3, 4, 5), 4), (FORCED_ID, 11, 12, 13))
    assert passage.ids == (2, FORCED_ID, 11, 12)
    assert (passage.tokens, passage.source, passage.first) == ((11, 12, 13), (3, 4, 5), 1)
