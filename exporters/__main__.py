"""``python -m exporters CHECKPOINT OUT``: export one checkpoint, with JSON-lines events on stdout.

``--dry-run`` loads and writes nothing; its ``finished`` event holds the ``plan``. Exit codes: 0 exported and proven ·
1 failed (the last event is ``error``) · 2 wrong usage · 3 sealed, but its certificate failed. Whatever libraries print
goes to stderr.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from exporters import ExportConfig, ExportError, export
from exporters.config import BLOCK_SIZES, DEVICES, ENGINE_SETTINGS, PRECISIONS, parse_setting
from exporters.errors import ExportCancelled
from exporters.events import EmitEvent, cancel_on_signals, events_on_stdout
from exporters.thresholds import NAMES, parse_threshold


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)

    def work(emit: EmitEvent) -> int:
        config = config_from(options)
        if options.dry_run:
            from exporters.dry_run import plan

            emit({"event": "finished", "plan": asdict(plan(config))})
            return 0
        version = export(config, emit, certify=not options.no_certify)
        return 3 if version.passed is False else 0

    return run_with_events(work)


def run_with_events(work: Callable[[EmitEvent], int]) -> int:
    """``work`` with its events on stdout, and whatever ends it early as an ``error`` event and exit code 1."""
    emit = events_on_stdout()
    cancel_on_signals()
    try:
        return work(emit)
    except (ExportError, ExportCancelled) as error:
        emit({"event": "error", "code": error.code, "message": str(error)})
    except Exception as error:
        traceback.print_exc()
        emit({"event": "error", "code": ExportError.code, "message": f"{type(error).__name__}: {error}"})
    return 1


def config_from(options: argparse.Namespace) -> ExportConfig:
    """Raises InvalidConfig."""
    return ExportConfig(
        checkpoint=options.checkpoint,
        out=options.out,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        precision=options.precision,
        device=options.device,
        block_size=options.block_size,
        accuracy_level=options.accuracy_level,
        calibration=options.calibration,
        max_source_len=options.max_source_len,
        lora_slots=options.lora_slots,
        lora_rank=options.lora_rank,
        lora_targets=tuple(filter(None, options.lora_targets.split(","))),
        engine=dict(map(parse_setting, options.engine)),
        thresholds=dict(parse_threshold(text) for text in options.threshold),
        eval_text=options.eval_text,
        name=options.name,
        overwrite=options.overwrite,
    )


def _parser() -> argparse.ArgumentParser:
    """Defaults are ExportConfig's own."""
    config = ExportConfig
    parser = argparse.ArgumentParser(
        prog="python -m exporters", description="Export a Hugging Face checkpoint to a version folder and prove it."
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="checkpoint folder, or id of a model on the Hub")
    add("out", metavar="OUT", type=Path, help="version folder to write")
    add("--name", help="what the model is called; only recorded")
    add("--precision", choices=PRECISIONS, default=config.precision, help="type of weights and products")
    add("--device", choices=DEVICES, default=config.device, help="where the version will run")
    add("--max-model-len", type=int, metavar="N", help="longest prompt + output in tokens")
    add("--max-num-seqs", type=int, metavar="N", default=config.max_num_seqs, help="cache rows (default: 32)")
    add("--max-source-len", type=int, metavar="N", help="encoder-decoder: longest source in tokens")
    add("--block-size", type=int, choices=BLOCK_SIZES, default=config.block_size, help="int4: weights per scale")
    add("--accuracy-level", type=int, choices=(0, 4), default=config.accuracy_level, help="int4: 4 multiplies in int8")
    add("--calibration", type=Path, metavar="FILE", help="int8: text that shows outlying activations")
    add("--lora-slots", type=int, metavar="N", default=config.lora_slots, help="adapters loaded at once (default: 0)")
    add("--lora-rank", type=int, metavar="R", default=config.lora_rank, help="largest rank of an adapter")
    add("--lora-targets", metavar="A,B", default=",".join(config.lora_targets), help="modules that adapters change")
    add("--engine", metavar="NAME=VALUE", action="append", default=[], help=f"setting: {', '.join(ENGINE_SETTINGS)}")
    add("--threshold", metavar="NAME=VALUE", action="append", default=[], help=f"limit to change: {', '.join(NAMES)}")
    add("--eval-text", type=Path, metavar="FILE", help="text to compare both models on instead of the built-in one")
    add("--no-certify", action="store_true", help="leave the proof out; the version then has no certificate")
    add("--dry-run", action="store_true", help="say what would be made, how large and how fast, and write nothing")
    add("--overwrite", action="store_true", help="replace OUT if it is a version folder")
    return parser


if __name__ == "__main__":
    sys.exit(main())
