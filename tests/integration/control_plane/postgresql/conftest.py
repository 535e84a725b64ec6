"""The unit tests' application, on a real PostgreSQL with the schema that the migrations make."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.control_plane import conftest as unit

unit_settings, triton, app, api_key, client = unit.settings, unit.triton, unit.app, unit.api_key, unit.client


@pytest.fixture
def settings(unit_settings, migrated_postgresql):
    return replace(unit_settings, database_url_override=migrated_postgresql)
