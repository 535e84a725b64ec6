"""Keys made as the documentation says, and signatures that the standard program verifies."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from control_plane.artifacts import ArtifactStore
from control_plane.settings import PROJECT_ROOT
from control_plane.signatures import TrustedKeys
from tests.unit.control_plane.registry.conftest import sealed

pytestmark = pytest.mark.integration


def test_keys_of_the_documentation_sign_what_the_standard_program_verifies(tmp_path: Path) -> None:
    (tmp_path / "trusted").mkdir()
    readme = (PROJECT_ROOT / "README.md").read_text()
    commands = re.findall(r"^openssl .*$", readme, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    store = ArtifactStore(str(tmp_path / "store"), tmp_path / "signing.pem")
    wanted = store.put(sealed(tmp_path / "a", "a"))
    store.check(wanted, TrustedKeys(tmp_path / "trusted"))

    (signature,) = (tmp_path / "store").glob(f"{wanted}.*.sig")
    (shown,) = re.findall(r"^(python -m model_signing verify .*)$", readme, re.MULTILINE)
    artifact = tmp_path / "store" / wanted
    places = {"python": sys.executable, "ARTIFACT": artifact, "SIGNATURE": signature}
    arguments = [str(places.get(word, word)) for word in shown.split()]
    for is_good in (True, False):
        found = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (found.returncode == 0) == is_good, found.stderr + found.stdout
        (artifact / "manifest.json").write_bytes(b"{}")
