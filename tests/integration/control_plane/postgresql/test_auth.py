"""What tests/unit/control_plane/test_auth.py promises, kept by PostgreSQL."""

from __future__ import annotations

import pytest

from tests.unit.control_plane.test_auth import *  # noqa: F403

pytestmark = pytest.mark.integration
