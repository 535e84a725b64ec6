"""What tests/unit/control_plane/registry/test_deployments.py promises, kept by PostgreSQL."""

from __future__ import annotations

import pytest

from tests.unit.control_plane.registry.conftest import app, connect, llmos  # noqa: F401
from tests.unit.control_plane.registry.test_deployments import *  # noqa: F403

pytestmark = pytest.mark.integration
