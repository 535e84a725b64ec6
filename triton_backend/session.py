"""How a graph is loaded into ONNX Runtime; the only place that names a provider."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import psutil
import torch

from triton_backend.cpu_features import without_saturation
from triton_backend.errors import VersionFolderError

CPU = torch.device("cpu")
GRAPHS_ADVICE = "; if it cannot be captured, export it with --engine cuda_graphs=false"


def load_session(
    path: Path,
    num_threads: int,
    device: torch.device = CPU,
    *,
    is_occasional: bool = False,
    cuda_graphs: bool = False,
) -> onnxruntime.InferenceSession:
    """A session over ``path`` with ``num_threads`` threads (0: one per physical core); raises VersionFolderError.

    On CUDA it computes on the calling thread's current PyTorch stream, for as long as it lives. The threads of an
    ``is_occasional`` session go to sleep as soon as a run ends, instead of spinning for a while on the cores of the
    session that runs next. ``cuda_graphs`` lets runs be captured, see ``run_options``.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads or psutil.cpu_count(logical=False) or 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    without_saturation(options)
    if is_occasional:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    providers = _providers(device, cuda_graphs)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        advice = GRAPHS_ADVICE if cuda_graphs else ""
        raise VersionFolderError(f"ONNX Runtime cannot load {path}: {error}{advice}") from error
    # ONNX Runtime goes on without a provider whose libraries it cannot load.
    if providers[0][0] not in session.get_providers():
        raise VersionFolderError(
            f"ONNX Runtime cannot start its {providers[0][0]} for {path}: see its own message above and install the "
            "CUDA and cuDNN libraries that it names, or export for the CPU"
        )
    return session


def run_options(graph_id: int | None = None) -> onnxruntime.RunOptions:
    """Options of a run that returns as soon as the device has its work; what it writes is read on the same stream.

    The first run with a ``graph_id`` ≥ 1 is captured as a CUDA graph, later ones replay it: they read and write the
    addresses of that first run, and host inputs keep the values they had. Only where the session has ``cuda_graphs``.
    """
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    options.add_run_config_entry("gpu_graph_id", str(graph_id or -1))
    return options


def new_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The stream on which PyTorch and ONNX Runtime compute in order, without waiting for each other; None on CPU.

    Not PyTorch's default one: ONNX Runtime takes its number, 0, for none at all, and it cannot be captured. Raises
    VersionFolderError if there is no such device.
    """
    if device.type == "cpu":
        return None
    if not torch.cuda.is_available() or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise VersionFolderError(
            "device has value 'cuda', but PyTorch or ONNX Runtime finds no CUDA device; use a machine with one and the "
            "CUDA builds of both, or export for the CPU"
        )
    return torch.cuda.Stream(device)


def use_stream(stream: torch.cuda.Stream | None) -> None:
    """Let the calling thread compute on ``stream`` from now on."""
    if stream is not None:
        torch.cuda.set_stream(stream)


def _providers(device: torch.device, cuda_graphs: bool) -> list[tuple[str, dict[str, str]]]:
    if device.type == "cpu":
        return [("CPUExecutionProvider", {})]
    onnxruntime.preload_dlls()
    stream = torch.cuda.current_stream(device).cuda_stream
    options = {"device_id": str(device.index or 0), "user_compute_stream": str(stream)}
    return [("CUDAExecutionProvider", {**options, "enable_cuda_graph": "1" if cuda_graphs else "0"})]
