"""What is done to a traced graph before it is saved, in order, whatever kind of model it belongs to.

traced ──► fuse ──► LoRA slots ──► fewer bits
           fewer,    if asked       if asked
           larger nodes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from exporters.config import ExportConfig
from exporters.fusions import fuse
from exporters.graph import GraphSize, graph_size
from exporters.lora import add_lora_slots
from exporters.quantization import QuantizationReport, quantize
from triton_backend.config import LoraConfig


@dataclass(frozen=True)
class GraphReport:
    """What became of one graph: its size as traced and after fusing, its adapter slots, its fewer bits."""

    traced: GraphSize
    fused: GraphSize
    lora: LoraConfig | None
    quantization: QuantizationReport | None

    def document(self) -> dict[str, Any]:
        """For events and the certificate."""
        found: dict[str, Any] = {"traced": asdict(self.traced), "fused": asdict(self.fused)}
        if self.quantization is not None:
            found["quantization"] = asdict(self.quantization)
        return found


def apply_passes(
    graph: ir.Model,
    export: ExportConfig,
    num_positions: int,
    torch_model: torch.nn.Module,
    calibration: Sequence[np.ndarray] | None = None,
) -> GraphReport:
    """Change ``graph`` in place. Rows hold at most ``num_positions`` tokens; ``calibration``: token ids (S,) of texts.

    Raises InvalidConfig or UnsupportedArchitecture if what was asked does not suit the graph.
    """
    traced = graph_size(graph)
    fuse(graph, num_positions)
    fused = graph_size(graph)
    lora = None
    if export.lora_slots:
        # CUDA graphs have no control flow; the pass to 16 bits does not look inside branches.
        is_skipped_when_unused = export.device == "cpu" and export.precision not in ("fp16", "bf16")
        lora = add_lora_slots(
            graph,
            export.lora_targets,
            export.lora_slots,
            export.lora_rank,
            torch_model,
            is_skipped_when_unused=is_skipped_when_unused,
        )
    quantization = quantize(graph, export, calibration) if export.precision != "fp32" else None
    return GraphReport(traced, fused, lora, quantization)
