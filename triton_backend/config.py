"""The disk side of a served version: ``model.json``, split into facts and settings.

``ModelConfig`` is what the exporter found out about the graph and never changes; ``EngineConfig`` is how to run it and
may be edited by an operator before the version is sealed. Both are frozen and checked when read, so the rest of the
engine never meets a bad value. Standard library only: exporters and the engine share this module.

    model.json = {"format": 2, "model": {…ModelConfig…}, "engine": {…EngineConfig…}}
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triton_backend.errors import InvalidRequest, VersionFolderError
from triton_backend.sampling_params import FIELDS

MODEL_JSON = "model.json"
FORMAT = 2

log = logging.getLogger(__name__)

KINDS = ("decoder", "encoder_decoder", "encoder")
CACHE_TYPES = ("fp32", "fp16", "bf16")
DEVICES = ("cpu", "cuda")
POOLINGS = ("mean", "cls", "last", "max")


@dataclass(frozen=True)
class LayerConfig:
    """Shape of one layer's cache: keys and values are (rows, num_kv_heads, max_model_len, head_size).

    For cross attention, whose keys and values the encoder computes once: (rows, num_kv_heads, max_source_len,
    head_size).
    """

    num_kv_heads: int
    head_size: int


@dataclass(frozen=True)
class LoraTarget:
    """One product of the graph that adapters may change: inputs ``lora.{name}.a`` (slots + 1, in_features, rank) and
    ``lora.{name}.b`` (slots + 1, rank, out_features); slot 0 is zero, the adapter's scale is part of b.

    ``name`` is the module's path in the checkpoint, such as ``model.layers.0.self_attn.q_proj``. ``columns``, if given,
    is the order in which the graph keeps the module's output features.
    """

    name: str
    in_features: int
    out_features: int
    columns: tuple[int, ...] = ()


@dataclass(frozen=True)
class LoraConfig:
    """Adapters of a LoRA-ready graph, chosen per row by the input ``adapter_ids`` int64 (B); 0 is none."""

    num_slots: int
    rank: int
    targets: tuple[LoraTarget, ...]


@dataclass(frozen=True)
class ModelConfig:
    """Facts about an exported model.

    ``kind``: ``decoder`` (one graph), ``encoder_decoder`` (``encoder_graph`` runs once per request and fills the cross
    attention's keys and values, ``cross_layers``) or ``encoder`` (one graph that gives embeddings).
    ``num_top_logits`` is K of the graph's ``top_logits``/``top_ids`` outputs. ``precision`` is what weights are kept
    and multiplied in, ``cache_type`` the type of keys and values. ``generation_defaults`` holds the sampling parameters
    of the checkpoint's generation_config.json, used where a request names none. An encoder–decoder's decoder begins
    with ``decoder_start_token_id``, which is not part of the output, then ``forced_bos_token_id`` if any, which is.
    ``forced_eos_token_id`` is the last token of an output that reaches max_tokens. ``source_vocab_size`` is the
    encoder's, if it differs from the decoder's. ``suppressed_token_ids`` are never chosen: they are not among
    ``top_ids``, but count in ``logits``.
    An encoder's embeddings have ``embedding_size`` numbers, made from token vectors by ``pooling`` and scaled to length
    1 if ``normalize``; the graph does both.
    """

    architecture: str
    model_type: str
    vocab_size: int
    max_position_embeddings: int
    layers: tuple[LayerConfig, ...]
    num_top_logits: int
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    precision: str = "fp32"
    graph: str = "model.onnx"
    generation_defaults: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "decoder"
    cache_type: str = "fp32"
    encoder_graph: str | None = None
    cross_layers: tuple[LayerConfig, ...] = ()
    decoder_start_token_id: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    source_vocab_size: int | None = None
    suppressed_token_ids: tuple[int, ...] = ()
    lora: LoraConfig | None = None
    pooling: str | None = None
    normalize: bool = False
    embedding_size: int = 0

    def __post_init__(self) -> None:
        _require_positive(self, "vocab_size", "max_position_embeddings")
        if self.kind not in KINDS:
            raise VersionFolderError(f"kind has value {self.kind!r}; expected one of {', '.join(KINDS)}")
        if self.cache_type not in CACHE_TYPES:
            raise VersionFolderError(f"cache_type has value {self.cache_type!r}; expected {', '.join(CACHE_TYPES)}")
        if self.kind == "encoder":
            _require_positive(self, "embedding_size")
            if self.pooling not in POOLINGS:
                raise VersionFolderError(f"pooling has value {self.pooling!r}; expected one of {', '.join(POOLINGS)}")
            return
        _require_positive(self, "num_top_logits")
        if not self.layers:
            raise VersionFolderError("layers is empty; expected one entry per decoder layer")
        for name in ("encoder_graph", "cross_layers", "decoder_start_token_id"):
            if self.kind == "encoder_decoder" and getattr(self, name) in (None, "", ()):
                raise VersionFolderError(f"{name} has value {getattr(self, name)!r}; an encoder_decoder model needs it")


@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs a graph; names are vLLM's.

    max_model_len           longest prompt + output of one sequence, in tokens
    max_num_seqs            cache rows, so sequences that can run at once
    max_num_batched_tokens  tokens computed in one step over all sequences; a longer prompt is prefilled in chunks
    max_queue_size          requests that may wait; one more is refused with UNAVAILABLE
    stream_interval         tokens that share one streamed response, if an earlier one does not wait to be sent
    long_prefill_token_threshold  prompt tokens computed in one step while other sequences are decoding, per prompt
    enable_prefix_caching   a prompt copies the keys and values of its longest prefix that any cache row holds
    deterministic           a request's tokens never depend on what ran before or beside it, to the last bit; without it
                            generated tokens are shared as prefixes, too, and may be drafted
    num_speculative_tokens  tokens drafted from the text so far and verified in one run; 0 = none
    device                  cpu or cuda
    cuda_graphs             decode steps are captured as CUDA graphs when the version is loaded; more rows than run may
                            be computed
    num_threads             threads of ONNX Runtime; 0 = one per physical core
    max_source_len          longest source text of an encoder–decoder, in tokens; 0 for other models
    """

    max_model_len: int
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    max_queue_size: int = 256
    stream_interval: int = 1
    long_prefill_token_threshold: int = 64
    enable_prefix_caching: bool = True
    deterministic: bool = True
    num_speculative_tokens: int = 0
    device: str = "cpu"
    cuda_graphs: bool = False
    num_threads: int = 0
    max_source_len: int = 0

    def __post_init__(self) -> None:
        _require_positive(self, "max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_queue_size")
        _require_positive(self, "stream_interval", "long_prefill_token_threshold")
        for name in ("num_threads", "max_source_len", "num_speculative_tokens"):
            value = getattr(self, name)
            if not _is_whole(value) or value < 0:
                raise VersionFolderError(f"{name} has value {value!r}; expected a whole number ≥ 0")
        # A step must always have room for prompt tokens beside all decoding rows.
        if self.max_num_batched_tokens <= self.max_num_seqs:
            raise VersionFolderError(
                f"max_num_batched_tokens has value {self.max_num_batched_tokens}; expected at least "
                f"max_num_seqs + 1 = {self.max_num_seqs + 1}"
            )
        for name in ("enable_prefix_caching", "deterministic", "cuda_graphs"):
            if not isinstance(getattr(self, name), bool):
                raise VersionFolderError(f"{name} has value {getattr(self, name)!r}; expected true or false")
        if self.device not in DEVICES:
            raise VersionFolderError(f"device has value {self.device!r}; expected one of {', '.join(DEVICES)}")
        if self.cuda_graphs and self.device != "cuda":
            raise VersionFolderError(f"cuda_graphs is true, but device has value {self.device!r}; expected 'cuda'")
        if self.num_speculative_tokens and self.deterministic:
            raise VersionFolderError(
                f"num_speculative_tokens has value {self.num_speculative_tokens}, but deterministic is true: "
                "tokens that are verified together differ in their last bits; set one of them to its opposite"
            )


@dataclass(frozen=True)
class VersionConfig:
    """The whole of ``model.json``."""

    model: ModelConfig
    engine: EngineConfig

    def __post_init__(self) -> None:
        if self.model.kind == "encoder_decoder" and not self.engine.max_source_len:
            raise VersionFolderError("max_source_len has value 0; an encoder_decoder needs at least 1")
        if self.model.kind == "encoder_decoder" and self.engine.cuda_graphs:
            raise VersionFolderError("cuda_graphs is true; steps of an encoder_decoder cannot be captured")

    def write(self, folder: Path) -> None:
        document = {"format": FORMAT, **dataclasses.asdict(self)}
        (folder / MODEL_JSON).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> VersionConfig:
        """Read ``folder/model.json``; raises VersionFolderError that names the file and the offending key."""
        path = folder / MODEL_JSON
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise VersionFolderError(f"cannot read {path}: {error}") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            found = document.get("format") if isinstance(document, dict) else type(document).__name__
            raise VersionFolderError(
                f"{path} has format {found!r}; this engine reads format {FORMAT}: export the checkpoint again"
            )
        try:
            model = dict(document["model"])
            for layers in ("layers", "cross_layers"):
                model[layers] = tuple(_from_mapping(LayerConfig, layer) for layer in model.get(layers, ()))
            if model.get("lora"):
                model["lora"] = _lora_from(model["lora"])
            for ids in ("eos_token_ids", "suppressed_token_ids"):
                model[ids] = tuple(model.get(ids, ()))
            model["generation_defaults"] = _defaults_from(model.get("generation_defaults", {}))
            return cls(_from_mapping(ModelConfig, model), _from_mapping(EngineConfig, document["engine"]))
        except VersionFolderError as error:
            raise VersionFolderError(f"{path}: {error.args[0]}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise VersionFolderError(f"{path} is not a valid model.json: {error!r}") from error


def _defaults_from(values: Mapping[str, Any]) -> dict[str, Any]:
    """Checked as a request's parameters are, whose place they take."""
    defaults: dict[str, Any] = {}
    for name, value in dict(values).items():
        if name not in FIELDS:
            raise VersionFolderError(f"generation_defaults has {name!r}; expected names of sampling parameters")
        try:
            defaults[name] = FIELDS[name].parse(name, value)
        except InvalidRequest as error:  # exported by a release that did not look
            log.warning("a default of the model is left out: %s", error.args[0])
    return defaults


def _lora_from(values: Mapping[str, Any]) -> LoraConfig:
    targets = tuple(
        _from_mapping(LoraTarget, {**target, "columns": tuple(target.get("columns", ()))})
        for target in values.get("targets", ())
    )
    lora: LoraConfig = _from_mapping(LoraConfig, {**values, "targets": targets})
    return lora


def _from_mapping(config_class: type, values: Mapping[str, Any]) -> Any:
    known = {f.name for f in dataclasses.fields(config_class)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise VersionFolderError(
            f"unknown {config_class.__name__} key {unknown[0]!r}; known keys are {', '.join(sorted(known))}"
        )
    return config_class(**values)


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not _is_whole(value) or value < 1:
            raise VersionFolderError(f"{name} has value {value!r}; expected a whole number ≥ 1")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
