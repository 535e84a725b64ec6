"""What building the web application may and may not pull in."""

from __future__ import annotations

import subprocess
import sys

import pytest

from control_plane import create_app
from control_plane.errors import SettingsError
from control_plane.settings import Settings

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


@pytest.mark.parametrize("url", ["localhost:6379", "redis://:hidden@host:port/0", "redi://:hidden@host:6379/0"])
def test_a_bad_address_of_redis_is_one_sentence_without_its_password(tmp_path, url):
    with pytest.raises(SettingsError, match="LLMOS_REDIS_URL is no address of a Redis; expected redis://") as refused:
        create_app(Settings.from_environment({"LLMOS_HOME": str(tmp_path), "LLMOS_REDIS_URL": url}))
    assert "hidden" not in str(refused.value)


def test_settings_alone_bring_no_web_framework(tmp_path):
    modules = _modules_after("import control_plane.settings", tmp_path)
    assert modules.isdisjoint({"flask", "grpc", "sqlalchemy", "celery", *HEAVY})
