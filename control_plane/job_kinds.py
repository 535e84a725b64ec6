"""Every kind of job there is."""

from __future__ import annotations

from control_plane.evaluation import steps as evaluation
from control_plane.jobs.kinds import JobKind
from control_plane.registry import steps as registry
from control_plane.training import steps as training

KINDS: dict[str, JobKind] = {
    "export": JobKind(
        "export a checkpoint to ONNX and prove it equal", registry.ExportParams, {"export": registry.export}, "cpu"
    ),
    "publish": JobKind(
        "export a checkpoint, prove it, store it and register it as the next version of its model",
        registry.ExportParams,
        {"export": registry.build, "store": registry.store, "register": registry.register},
        "cpu",
    ),
    "verify": JobKind("run a version's proof again", registry.VerifyParams, {"verify": registry.verify_version}, "cpu"),
    "evaluate": JobKind(
        "measure a version with a suite and record its metrics",
        evaluation.EvaluateParams,
        {"find": evaluation.find, "evaluate": evaluation.evaluate, "record": evaluation.record},
        "cpu",
    ),
    "pretrain": JobKind(
        "train a small language model from scratch",
        training.PretrainParams,
        {"pretrain": training.pretrain},
        "cpu",
        "developer",
    ),
}
