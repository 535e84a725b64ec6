"""What tests/unit/control_plane/test_jobs_api.py promises, kept by PostgreSQL."""

from __future__ import annotations

import pytest

from tests.unit.control_plane.test_jobs_api import *  # noqa: F403

pytestmark = pytest.mark.integration
