"""Every kind of job there is."""

from __future__ import annotations

from control_plane.jobs.kinds import JobKind
from control_plane.registry import steps as registry
from control_plane.training import steps as training

KINDS: dict[str, JobKind] = {
    "export": JobKind(
        "export a checkpoint to ONNX and prove it equal", registry.ExportParams, {"export": registry.export}, "cpu"
    ),
    "verify": JobKind(
        "run a version's proof again", registry.VerifyParams, {"verify": registry.verify_version}, "cpu", "developer"
    ),
    "pretrain": JobKind(
        "train a small language model from scratch",
        training.PretrainParams,
        {"pretrain": training.pretrain},
        "cpu",
        "developer",
    ),
}
