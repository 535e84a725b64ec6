"""Exporters: a Hugging Face checkpoint becomes a proven, sealed version folder.

    checkpoint ──► original ──► decoder (attention, norms) ──► version ──► certificate ──► manifest
    safe files     PyTorch       one ONNX graph                folder      engine = original

``python -m exporters CHECKPOINT OUT`` is the program, ``export(ExportConfig(…))`` the same in Python. Importing this
package is light; PyTorch is loaded when an export runs.
"""

from __future__ import annotations

from exporters.config import ExportConfig, ExportedVersion
from exporters.errors import ExportError
from exporters.events import EmitEvent

__all__ = ["ExportConfig", "ExportError", "ExportedVersion", "export"]


def export(config: ExportConfig, emit: EmitEvent = lambda event: None, *, certify: bool = True) -> ExportedVersion:
    """Export, certify and seal one version; raises ExportError. ``emit`` receives the events of ``exporters.events``.

    A version whose certificate fails is sealed and returned with ``passed`` False; what becomes of it is the caller's
    decision. ``certify=False`` leaves the proof out, for tests of other parts.
    """
    from exporters.pipeline import run

    return run(config, emit, with_certificate=certify)
