"""Values of variables that stop the program, and what it then says."""

from __future__ import annotations

import pytest

from control_plane.errors import SettingsError
from control_plane.settings import Settings

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("url", ["sqlite:////tmp/l.db", "postgresql://u@h/d", "postgresql+psycopg://u:p@[::1]:5432/d"])
def test_both_databases_are_taken(url):
    assert Settings.from_environment({"LLMOS_DATABASE_URL": url}).database_url == url


@pytest.mark.parametrize("start", ["postgres", "mysql", "postgresql+psycopg2", "nonsense", "postgresql"])
def test_another_database_or_a_bad_port_is_refused_without_its_password(start):
    with pytest.raises(SettingsError, match="LLMOS_DATABASE_URL has value") as refused:
        Settings.from_environment({"LLMOS_DATABASE_URL": f"{start}://me:sec@ret@host:54x/llmos"})
    assert "://…@host:54x/llmos'; expected sqlite:///PATH or postgresql+psycopg://USER:PASSWORD" in str(refused.value)
