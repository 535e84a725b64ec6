"""A registry in memory, and sealed folders to put into it."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from control_plane import create_app
from control_plane.auth.services import create_key
from control_plane.client import ControlPlane
from control_plane.extensions import db
from control_plane.triton_fake import FakeTriton
from triton_backend.version_folder import seal


@pytest.fixture
def app(settings):
    app = create_app(settings, FakeTriton({}))
    with app.app_context():
        db.create_all()
        yield app


@pytest.fixture
def connect(app):
    """A client of the API with a key of a role."""

    def connect(role: str) -> ControlPlane:
        return ControlPlane("http://llmos", create_key(role, role), transport=httpx.WSGITransport(app))

    return connect


@pytest.fixture
def llmos(connect) -> ControlPlane:
    return connect("operator")


def sealed(folder: Path, salt: str, passed: bool | None = True) -> Path:
    """A version folder with a certificate that ``passed``, or none."""
    folder.mkdir(parents=True)
    (folder / "model.json").write_text(json.dumps({"model": {"architecture": "Tiny", "precision": "fp32"}, "s": salt}))
    if passed is not None:
        summary = {"passed": passed, "num_tokens_compared": 64, "max_logit_difference": 1e-5}
        (folder / "certificate.json").write_text(json.dumps({"summary": summary}))
    seal(folder, {"checkpoint": salt}, {})
    return folder
