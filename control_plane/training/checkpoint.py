"""Writes a trained model as a Hugging Face folder that appears whole or not at all.

out.parent/.starter.staged-4711/   while the recipe runs; removed when it fails or is stopped, if killed by llmos gc
out.parent/starter/                the same folder, renamed when every file is in it
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from control_plane.training.errors import OutputExists


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside ``out`` that becomes ``out`` on success. Raises OutputExists before writing anything."""
    refuse_taken(out)
    staging = out.parent / f".{out.name}.staged-{os.getpid()}"
    try:
        staging.mkdir(parents=True)
        yield staging
        refuse_taken(out)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def refuse_taken(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise OutputExists(f"{out} exists and is not a folder; choose another output folder")
    if out.is_dir() and any(out.iterdir()):
        raise OutputExists(f"{out} exists and is not empty; choose another output folder")


def write_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    generation_config: GenerationConfig,
    model_card: str,
) -> None:
    """config.json, model.safetensors, tokenizer.json, tokenizer_config.json, generation_config.json and README.md."""
    model.generation_config = generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(model_card, encoding="utf-8")
