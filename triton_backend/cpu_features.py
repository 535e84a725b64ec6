"""What this CPU can do, and what a session of ONNX Runtime is told about it. Standard library only: the engine and the
exporters open their sessions alike.

Setting: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html#when-and-why-do-i-need-to-try-u8u8
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

CPUINFO = Path("/proc/cpuinfo")


def has_vnni(cpuinfo: Path = CPUINFO) -> bool:
    """Whether products of unsigned with signed bytes are summed in 32 bits, so that none of them saturates."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return "avx512_vnni" in flags or "avx_vnni" in flags


def without_saturation(options: Any) -> None:
    """Let a session with these SessionOptions multiply unsigned bytes by unsigned ones where the others would saturate.

    Only x86 CPUs do that, and only int8 graphs have such products; elsewhere the setting changes nothing.
    """
    if not has_vnni():
        options.add_session_config_entry("session.x64quantprecision", "1")
