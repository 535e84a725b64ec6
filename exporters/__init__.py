"""Exporters: a Hugging Face checkpoint becomes a proven, sealed version folder.

    checkpoint ──► original ──► decoder (attention, norms) ──► version ──► certificate ──► manifest
    safe files     PyTorch       one ONNX graph                folder      engine = original

``python -m exporters CHECKPOINT OUT`` is the program, ``export(ExportConfig(…))`` the same in Python. Importing this
package is light; PyTorch is loaded when an export runs.
"""

from __future__ import annotations

import errno

from exporters.config import ExportConfig, ExportedVersion
from exporters.errors import ExportError, OutOfSpace
from exporters.events import EmitEvent

__all__ = ["ExportConfig", "ExportError", "ExportedVersion", "export"]

OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def export(config: ExportConfig, emit: EmitEvent = lambda event: None, *, certify: bool = True) -> ExportedVersion:
    """Export, certify and seal one version; raises ExportError. ``emit`` receives the events of ``exporters.events``.

    A version whose certificate fails is sealed and returned with ``passed`` False; what becomes of it is the caller's
    decision. ``certify=False`` leaves the proof out, for tests of other parts.
    """
    from exporters.pipeline import run

    try:
        return run(config, emit, with_certificate=certify)
    except OSError as error:
        if not _is_out_of_space(error):
            raise
        raise OutOfSpace(
            f"cannot write {config.out}: the disk is full or its files may not grow so large ({error}); nothing was "
            "kept: free some space (--dry-run says how much is needed) or choose another output folder"
        ) from error


def _is_out_of_space(error: OSError) -> bool:
    """numpy, which writes the weights, gives no number: "problem writing element …" or "… requested and … written"."""
    if error.errno is None:
        return "writing" in str(error) or "written" in str(error)
    return error.errno in OUT_OF_SPACE
