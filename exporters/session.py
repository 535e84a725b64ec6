"""How exporters load a version's graph into ONNX Runtime: where the engine runs it, so that what is measured is what is
served. Without PyTorch, whose memory is not to be measured.
"""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort

from exporters.errors import EngineFailed
from triton_backend.cpu_features import without_saturation


def open_session(graph: Path, device: str, options: ort.SessionOptions) -> ort.InferenceSession:
    """Raises EngineFailed if ``device``, ``cpu`` or ``cuda``, cannot be used."""
    if device == "cuda":
        ort.preload_dlls()
    without_saturation(options)
    provider = f"{device.upper()}ExecutionProvider"
    session = ort.InferenceSession(str(graph), options, providers=[provider])
    if provider not in session.get_providers():  # ONNX Runtime goes on without one that it cannot start
        raise EngineFailed(f"ONNX Runtime cannot start its {provider} for {graph}: see its own message above")
    return session
