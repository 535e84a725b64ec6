"""Values of variables that stop the program, and what it then says."""

from __future__ import annotations

import pytest

from control_plane.errors import SettingsError
from control_plane.extensions import now
from control_plane.settings import PROJECT_ROOT, Settings

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("url", ["sqlite:////tmp/l.db", "postgresql://u@h/d", "postgresql+psycopg://u:p@[::1]:5432/d"])
def test_both_databases_are_taken(url):
    assert Settings.from_environment({"LLMOS_DATABASE_URL": url}).database_url == url


@pytest.mark.parametrize("start", ["postgres://", "mysql://", "postgresql+psycopg2://", "nonsense://"])
@pytest.mark.parametrize("password", ["secret", "sec@ret", "sec/ret"])
def test_another_database_is_refused_without_its_password(start, password):
    with pytest.raises(SettingsError, match="LLMOS_DATABASE_URL has value") as refused:
        Settings.from_environment({"LLMOS_DATABASE_URL": f"{start}me:{password}@host:5432/llmos"})
    assert f"'{start}…@host:5432/llmos'; expected sqlite:///PATH or postgresql+psycopg://USER" in str(refused.value)


def test_a_bad_port_is_refused():
    with pytest.raises(SettingsError, match="expected sqlite:///PATH or postgresql"):
        Settings.from_environment({"LLMOS_DATABASE_URL": "postgresql://me:secret@host:54x/llmos"})


@pytest.mark.parametrize("days", ["0", "-1", "36501", "1.5", "soon", "9" * 30])
def test_days_are_whole_and_can_be_subtracted_from_today(days):
    with pytest.raises(SettingsError, match="expected a whole number of days from 1 to 36500"):
        Settings.from_environment({"LLMOS_RETRY_DAYS": days})
    longest = Settings.from_environment({"LLMOS_RETRY_DAYS": "36500"})
    assert now() - longest.retry_limit < now()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("LLMOS_WEBPORT", "LLMOS_WEBPORT is set, but llmos has no such setting; did you mean LLMOS_WEB_PORT?"),
        (
            "LLMOS_XYZZY",
            "LLMOS_XYZZY is set, but llmos has no such setting; README.md lists those there are; unset it.",
        ),
    ],
)
def test_an_unknown_name_is_refused_with_the_closest_known_one(name, said):
    with pytest.raises(SettingsError) as refused:
        Settings.from_environment({name: "8080", "OTHER": "x"})
    assert str(refused.value) == said


def test_relative_paths_are_relative_to_the_project_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = Settings.from_environment({"LLMOS_HOME": "data", "LLMOS_TRUSTED_KEYS": str(tmp_path / "keys")})
    assert settings.home == PROJECT_ROOT / "data"
    assert settings.trusted_keys == tmp_path / "keys"
    (tmp_path / "data").mkdir()
    with pytest.raises(SettingsError, match=r"LLMOS_HOME has value 'data'; expected an absolute path, since .* exists"):
        Settings.from_environment({"LLMOS_HOME": "data"})


@pytest.mark.parametrize(
    "name",
    ["LLMOS_SERVICE_HOST", "LLMOS_SERVICE_PORT_HTTP", "LLMOS_PORT", "LLMOS_DB_PORT", "LLMOS_PORT_8080_TCP_ADDR"],
)
def test_what_kubernetes_sets_for_a_service_of_our_name_is_no_setting(name):
    assert Settings.from_environment({name: "tcp://10.0.0.1:8080"}) == Settings.from_environment({})
