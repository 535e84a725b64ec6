"""What building the web application may and may not pull in."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.unit

HEAVY = ("torch", "transformers", "onnxruntime", "onnx", "tokenizers")


def _modules_after(code: str, tmp_path) -> set[str]:
    environment = {"LLMOS_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    script = f"{code}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    return set(done.stdout.split())


def test_web_process_never_imports_the_engines_libraries(tmp_path):
    modules = _modules_after("import control_plane.wsgi", tmp_path)
    assert "control_plane.gateway.views" in modules
    assert modules.isdisjoint(HEAVY)


def test_settings_alone_bring_no_web_framework(tmp_path):
    modules = _modules_after("import control_plane.settings", tmp_path)
    assert modules.isdisjoint({"flask", "grpc", "sqlalchemy", "celery", *HEAVY})
