"""How a graph is loaded into ONNX Runtime; the only place that names a provider."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import psutil
import torch

from triton_backend.errors import VersionFolderError

CPU = torch.device("cpu")


def load_session(
    path: Path, num_threads: int, device: torch.device = CPU, *, is_occasional: bool = False
) -> onnxruntime.InferenceSession:
    """A session over ``path`` with ``num_threads`` threads (0: one per physical core); raises VersionFolderError.

    The threads of an ``is_occasional`` session go to sleep as soon as a run ends, instead of spinning for a while on
    the cores of the session that runs next.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads or psutil.cpu_count(logical=False) or 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if is_occasional:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=_providers(device))
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        raise VersionFolderError(f"ONNX Runtime cannot load {path}: {error}") from error


def _providers(device: torch.device) -> list[Any]:
    """Raises VersionFolderError if ``device`` is not there."""
    if device.type == "cpu":
        return ["CPUExecutionProvider"]
    if not torch.cuda.is_available() or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise VersionFolderError(
            "device has value 'cuda', but PyTorch or ONNX Runtime finds no CUDA device; set device to 'cpu' in "
            "model.json or install the CUDA builds of both"
        )
    # One stream for both libraries: what ONNX Runtime writes is read by PyTorch in order, without waiting.
    stream = torch.cuda.current_stream(device).cuda_stream
    return [("CUDAExecutionProvider", {"device_id": device.index or 0, "user_compute_stream": str(stream)})]
