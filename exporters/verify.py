"""``python -m exporters.verify FOLDER``: run the proof of a version again, here and now.

    files ──► sealed, plain, reading nothing else ──► tokens of the recorded prompts ──► the original beside it

The recorded tokens can be repeated anywhere, so that a version on another machine is known to be the one that was
proven. Whether it equals the original can only be asked where the checkpoint is: at the path it was exported from, or
where ``--checkpoint`` says. Exit codes: 0 equal · 1 failed (the last event is ``error``) · 2 wrong usage · 3 not equal.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from exporters.artifact import check_version
from exporters.checkpoint import Checkpoint, open_checkpoint
from exporters.errors import ExportError, InvalidCheckpoint, InvalidVersion
from exporters.events import EmitEvent, Progress
from exporters.thresholds import NAMES, Thresholds, parse_threshold, thresholds_for
from triton_backend.config import VersionConfig
from triton_backend.errors import VersionFolderError
from triton_backend.version_folder import digest, sha256_of

STEPS = ("check", "certify", "repeat")


@dataclass(frozen=True)
class Repetition:
    """Recorded prompts run again. Their tokens are those recorded, or left them at a tie, or elsewhere.

    ``max_logit_difference`` is taken over the recorded largest logits of every prompt.
    """

    num_prompts: int
    num_equal: int
    num_ties: int
    num_mismatches: int
    max_logit_difference: float | None


@dataclass(frozen=True)
class Verification:
    """What a proof that was run again has shown.

    ``original`` is where the checkpoint was found, or None with the ``reason``; then only the recorded tokens were
    repeated. ``recorded`` and ``found`` are the summaries of the certificate in the folder and of the new one.
    """

    folder: Path
    digest: str
    passed: bool
    original: str | None
    reason: str | None
    repetition: Repetition | None
    recorded: Mapping[str, Any] = field(default_factory=dict)
    found: Mapping[str, Any] = field(default_factory=dict)


def verify(
    folder: Path,
    checkpoint: str | None = None,
    emit: EmitEvent = lambda event: None,
    *,
    thresholds: Mapping[str, float] | None = None,
    eval_text: Path | None = None,
) -> Verification:
    """Run the proof of the version in ``folder`` again; raises ExportError if it cannot be run.

    ``thresholds`` are changes to the recorded ones, ``eval_text`` is the text that was given to the export, if any.
    """
    progress = Progress(emit, STEPS)
    emit({"event": "started", "folder": str(folder)})
    progress.step("check")
    manifest = check_version(folder)
    recorded = _recorded(folder)
    try:
        config = VersionConfig.read(folder)
    except VersionFolderError as error:
        raise InvalidVersion(error.args[0]) from error
    original, reason = _find_checkpoint(manifest.get("source", {}), checkpoint)
    if original is None and not _has_tokens(recorded):
        raise InvalidVersion(
            f"{folder} has no recorded tokens to repeat, and {reason}; pass the original with --checkpoint PATH"
        )

    progress.step("certify")
    limits = _limits(config, recorded, thresholds or {})
    found: dict[str, Any] = {}
    if original is not None:
        from exporters.certificate import certify

        found = certify(folder, original, recorded.get("sliding_window"), progress, limits, eval_text)

    progress.step("repeat")
    repetition = _repeat(folder, config, recorded, found, limits) if _has_tokens(recorded) else None
    verification = Verification(
        folder=folder,
        digest=digest(folder),
        passed=(recorded if original is None else found).get("passed") is not False
        and (repetition is None or repetition.num_mismatches == 0),
        original=str(original.folder) if original else None,
        reason=reason,
        repetition=repetition,
        recorded=recorded.get("summary", {}),
        found=found.get("summary", {}),
    )
    emit({"event": "finished", **asdict(verification), "folder": str(folder), "checks": found.get("checks", [])})
    return verification


def _recorded(folder: Path) -> dict[str, Any]:
    """The certificate in ``folder``; empty if the version was exported without one."""
    path = folder / "certificate.json"
    if not path.exists():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidVersion(f"cannot read {path} as JSON ({error}); export the version again") from error
    if not isinstance(document, dict):
        raise InvalidVersion(f"{path} holds a JSON {type(document).__name__}; expected an object")
    return document


def _has_tokens(recorded: Mapping[str, Any]) -> bool:
    """Not of an encoder, and not in a certificate of the first format."""
    return any(result.get("token_ids") for result in recorded.get("tokens", []))


def _limits(config: VersionConfig, recorded: Mapping[str, Any], changes: Mapping[str, float]) -> Thresholds:
    known = {
        name: value for name, value in recorded.get("thresholds", {}).items() if name in NAMES and value is not None
    }
    return thresholds_for(config.model.precision, {**known, **changes})


def _find_checkpoint(source: Mapping[str, Any], given: str | None) -> tuple[Checkpoint | None, str | None]:
    """The checkpoint that the manifest names by its hashes, or why there is none; raises if a given one is another."""
    name = str(source.get("checkpoint", ""))
    if given is None and not Path(name).is_dir():
        return None, f"the checkpoint {name!r} is not on this machine"
    try:
        checkpoint = open_checkpoint(given or name)
    except ExportError as error:
        if given is not None:
            raise
        return None, str(error)
    for path in (checkpoint.folder / "config.json", *checkpoint.files):
        expected = source.get("files", {}).get(path.name)
        if sha256_of(path) != expected:
            problem = f"{path} is not the file that this version was made from (expected sha256 {expected})"
            if given is not None:
                raise InvalidCheckpoint(f"{problem}; pass the folder of the original checkpoint")
            return None, problem
    return checkpoint, None


def _repeat(
    folder: Path, config: VersionConfig, recorded: Mapping[str, Any], found: Mapping[str, Any], limits: Thresholds
) -> Repetition:
    from exporters.certificate import probe
    from exporters.engine_process import run_prompts
    from exporters.logits import ExportedGraph
    from exporters.passages import passage_of
    from exporters.prompts import Prompt

    results = recorded["tokens"]
    prompts = [Prompt(r["name"], tuple(r["prompt_ids"]), len(r["token_ids"])) for r in results]
    if [tuple(r["prompt_ids"]) for r in found.get("tokens", [])] == [prompt.ids for prompt in prompts]:
        tokens = tuple(tuple(r["token_ids"]) for r in found["tokens"])
        tops = [dict(r["top"]) for r in found["tokens"]]
    else:
        tokens = run_prompts(folder, config, prompts, measure=False).tokens
        passages = [passage_of(config, prompt, new) for prompt, new in zip(prompts, tokens, strict=True)]
        graph = ExportedGraph(folder, config)
        tops = [dict(enumerate([] if row is None else row.tolist())) for row in probe(graph, passages)]
    counts = {"equal": 0, "tie": 0, "mismatch": 0}
    for prompt, result, new in zip(prompts, results, tokens, strict=True):
        old = tuple(result["token_ids"])
        position = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), None)
        if old == new:
            counts["equal"] += 1
        elif position is None:  # one of them ended early
            counts["mismatch"] += 1
        else:
            passage = passage_of(config, prompt, old)
            index = passage.first + position - (len(old) - len(passage.tokens))
            logits = ExportedGraph(folder, config).at(passage.ids[: index + 1], [index], passage.source)[0]
            is_tie = abs(float(logits[old[position]] - logits[new[position]])) < limits.tie_logit_gap
            counts["tie" if is_tie else "mismatch"] += 1
    differences = [
        abs(value - top[token])
        for result, top in zip(results, tops, strict=True)
        for token, value in result["top"]
        if token in top
    ]
    return Repetition(len(prompts), counts["equal"], counts["tie"], counts["mismatch"], max(differences, default=None))


def main(arguments: Sequence[str] | None = None) -> int:
    from exporters.__main__ import run_with_events

    options = _parser().parse_args(arguments)

    def work(emit: EmitEvent) -> int:
        changes = dict(parse_threshold(text) for text in options.threshold)
        found = verify(options.folder, options.checkpoint, emit, thresholds=changes, eval_text=options.eval_text)
        return 0 if found.passed else 3

    return run_with_events(work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m exporters.verify", description="Run a version's proof again.")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="version folder")
    parser.add_argument("--checkpoint", metavar="PATH", help="the original, if it is not where it was")
    parser.add_argument(
        "--threshold", metavar="NAME=VALUE", action="append", default=[], help=f"limit to change: {', '.join(NAMES)}"
    )
    parser.add_argument("--eval-text", type=Path, metavar="FILE", help="the text that was given to the export, if any")
    return parser


if __name__ == "__main__":
    sys.exit(main())
