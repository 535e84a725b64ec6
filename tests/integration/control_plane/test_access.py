"""Keys, users and the audit log as people use them: the commands, over a real web server with a real Redis."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from control_plane.client import ApiError, ControlPlane
from control_plane.settings import PROJECT_ROOT

from .processes import web_server

pytestmark = pytest.mark.integration

PASSWORD = "correct horse battery"


@pytest.fixture
def llmos(environment):
    """Run the command; returns its stdout, or raises what it said on stderr."""

    def llmos(*arguments: str, key: str = "", stdin: str = "") -> str:
        variables = {**environment, "LLMOS_API_KEY": key, "COLUMNS": "250"}
        command = [sys.executable, "-m", "control_plane.cli", *arguments]
        done = subprocess.run(
            command, env=variables, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=60, input=stdin
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        return done.stdout.strip()

    return llmos


@pytest.fixture
def admin(llmos) -> str:
    """The first key, made before anything runs."""
    return llmos("keys", "create", "first", "--role", "admin")


@pytest.fixture
def url(environment, settings, tmp_path, redis_process, admin) -> Iterator[str]:
    with web_server(environment, settings.web_port, tmp_path / "web.log") as url:
        yield url


def test_keys_are_made_listed_and_revoked_over_the_api(llmos, admin, url):
    limits = ["--scope", "generate", "--model", "quick", "--days", "1", "--requests-per-minute", "2"]
    key = llmos("keys", "create", "shop front", *limits, "--tokens-per-minute", "1000", key=admin)
    prefix = key.split("_")[1]
    with ControlPlane(url, key) as shop:
        own = shop.key()
    assert (own["scopes"], own["models"], own["requests_per_minute"]) == (["generate"], ["quick"], 2)
    assert own["expires_at"] > own["created_at"]
    row = next(line for line in llmos("keys", "list", key=admin).splitlines() if prefix in line)
    assert all(text in row for text in ("shop front", "generate", "quick", "2 requests, 1000 tokens", "active"))
    assert key.split("_", 2)[2] not in llmos("keys", "list", "--json", key=admin)
    assert llmos("keys", "revoke", prefix, key=admin) == "revoked"
    with pytest.raises(RuntimeError, match="is revoked"):
        llmos("jobs", "list", key=key)
    # Made over the API, so the log knows who made it.
    events = json.loads(llmos("audit", "--object", prefix, "--json", key=admin))
    assert [(event["action"], event["actor"]) for event in events] == [
        ("key.revoke", f"key:{admin.split('_')[1]}"),
        ("key.create", f"key:{admin.split('_')[1]}"),
    ]


def test_a_key_that_may_not_make_keys_is_told_so_and_the_database_is_the_way_back(llmos, admin, url):
    viewer = llmos("keys", "create", "viewer", "--role", "viewer", key=admin)
    with pytest.raises(RuntimeError, match="needs the role 'admin'"):
        llmos("keys", "create", "mine", "--role", "admin", key=viewer)
    saved = llmos("keys", "create", "saved", "--role", "admin", "--direct", key=viewer)
    assert "saved" in llmos("keys", "list", key=saved)
    # With no key to ask with, the database is written as before the first start.
    assert llmos("keys", "create", "another").startswith("llmos_")


def test_users_are_made_changed_and_listed(llmos, admin, url):
    made = llmos("users", "create", "ada", "--role", "admin", "--password-stdin", key=admin, stdin=PASSWORD + "\n")
    assert made == "ada"
    with httpx.Client(base_url=url) as browser:
        body = {"name": "ada", "password": PASSWORD}
        assert browser.post("/api/v1/session", json=body).status_code == 201
        assert browser.get("/api/v1/users").json()["data"][0]["name"] == "ada"
        with pytest.raises(RuntimeError, match="last active administrator"):
            llmos("users", "set", "ada", "--role", "viewer", key=admin)
        changed = llmos("users", "set", "ada", "--password-stdin", key=admin, stdin=PASSWORD + "!\n")
        assert changed == "ada: admin, active"
        assert browser.get("/api/v1/users").status_code == 401
        assert browser.post("/api/v1/session", json=body).status_code == 401
    with pytest.raises(RuntimeError, match="nothing to change"):
        llmos("users", "set", "ada", key=admin)
    assert "ada" in llmos("users", "list", key=admin)
    assert "user.edit" in llmos("audit", "--action", "user.edit", key=admin)


def test_a_key_that_is_revoked_ends_its_open_streams_within_seconds(llmos, admin, url):
    with ControlPlane(url, admin) as api:
        made = api.create_key("long", "developer")
        job_id = api.submit_job("pretrain", {"name": "tiny"})["id"]
        ended: dict[str, float] = {}

        def follow() -> None:
            with ControlPlane(url, made["key"]) as own, pytest.raises(ApiError, match="is revoked"):
                list(own.follow_job(job_id))
            ended["job"] = time.monotonic()

        follower = threading.Thread(target=follow)
        follower.start()
        body = {"model": "starter", "prompt": "a", "max_tokens": 400, "stream": True}
        headers = {"Authorization": f"Bearer {made['key']}"}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=30) as answer:
            lines = answer.iter_lines()
            assert "choices" in next(lines)
            api.revoke_key(made["prefix"])
            revoked_at = time.monotonic()
            last = [line for line in lines if line][-1]
            ended["completion"] = time.monotonic()
        follower.join(10)
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "invalid_api_key"
    assert ended.keys() == {"job", "completion"}
    assert all(at - revoked_at < 5 for at in ended.values())
