"""Every kind of job there is."""

from __future__ import annotations

from control_plane.evaluation import steps as evaluation
from control_plane.jobs.kinds import JobKind
from control_plane.registry import adapter_steps as adapter
from control_plane.registry import checkpoints, garbage
from control_plane.registry import steps as registry
from control_plane.training import steps as training

KINDS: dict[str, JobKind] = {
    "export": JobKind(
        "export a checkpoint to ONNX and prove it equal", registry.ExportParams, {"export": registry.export}, "cpu"
    ),
    "publish": JobKind(
        "export a checkpoint, prove it, store it and register it as a version of its model; measure and serve it",
        registry.PublishParams,
        {
            "export": registry.build,
            "store": registry.store,
            "register": registry.register,
            "evaluate": evaluation.evaluate_published,
            "deploy": registry.deploy,
        },
        "cpu",
    ),
    "verify": JobKind("run a version's proof again", registry.VerifyParams, {"verify": registry.verify_version}, "cpu"),
    "adapter": JobKind(
        "make a PEFT adapter ready for a version and install it beside its model's versions",
        adapter.AdapterParams,
        {"choose": adapter.choose, "convert": adapter.convert, "install": adapter.install},
        "cpu",
    ),
    "evaluate": JobKind(
        "measure a version with a suite and record its metrics",
        evaluation.EvaluateParams,
        {"find": evaluation.find, "evaluate": evaluation.evaluate, "record": evaluation.record},
        "cpu",
    ),
    "import": JobKind(
        "fetch a checkpoint from a folder or the Hub, check it, store it and give it a name",
        checkpoints.ImportParams,
        {"fetch": checkpoints.fetch, "store": checkpoints.store, "install": checkpoints.install},
    ),
    "garbage-collect": JobKind(
        "remove artifacts, installed versions, exports and leftovers that nobody needs",
        garbage.CollectParams,
        {"collect": garbage.collect},
    ),
    "pretrain": JobKind(
        "train a small language model from scratch",
        training.PretrainParams,
        {"pretrain": training.pretrain},
        "cpu",
        "developer",
    ),
}
