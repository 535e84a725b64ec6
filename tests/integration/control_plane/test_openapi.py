"""The whole OpenAPI document, put to the test by schemathesis with a key of every role, on a real SQLite database; and
that nothing but what is meant to be public answers without a key.
"""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from pathlib import Path

import pytest
import schemathesis
from apiflask import APIFlask
from schemathesis.engine import Status, events, from_schema

from control_plane import create_app, upgrade_database
from control_plane.auth.roles import ROLES
from control_plane.auth.services import OWN, PREFIX, create_key
from control_plane.auth.tables import ApiKey
from control_plane.auth.users import create_user
from control_plane.extensions import db, now
from control_plane.jobs.services import JOB_ID
from control_plane.jobs.tables import FAILED, Job, JobEvent
from control_plane.registry import aliases, deployments, services, serving_state
from control_plane.registry.adapters import ADAPTER as ADAPTERS
from control_plane.registry.model_directory import NAME
from control_plane.registry.places import Place
from control_plane.registry.serving_state import LOADED, ModelState, ServingState
from control_plane.settings import Settings
from control_plane.triton_fake import FakeTriton, word_by_word
from tests.contract import watched
from triton_backend.version_folder import seal

pytestmark = pytest.mark.integration

PUBLIC = {
    "/",
    "/status",
    "/static/<path:filename>",
    "/health",
    "/health/live",
    "/health/ready",
    "/api/v1/openapi.json",
    "/api/v1/docs",
    "/api/v1/docs/<path:filename>",
}
"""Every route that answers without a key, and changes nothing."""
LOGIN = ("POST", "/api/v1/session")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "get")
JOB = "0" * 32
MODEL, ADAPTER = "starter", "poet"
"""The name of the model, and of a user; and of an adapter of the model."""
KEY = "0123456789ab"
# What a kind's or the engine's parameters must be together (hidden_size a multiple of the heads, n at most best_of)
# is no matter of a schema: what fits it may still be refused.
REFUSES_MORE = {"positive_data_acceptance": {"enabled": False}}
# Numbers of /v1/completions may be texts, as other servers' clients send them.
TAKES_MORE = {"negative_data_rejection": {"enabled": False}}
ASKS_FOR_MORE = {"POST /api/v1/jobs", "GET /api/v1/keys/{prefix}", "DELETE /api/v1/keys/{prefix}"}
"""Where a higher role may be needed according to what is asked."""
SESSION = "/api/v1/session"
"""Nobody is signed in here: what it does with somebody who is stands in the tests of sessions."""
CONFIG = {
    "seed": 1,
    "checks": {
        # Its repeated request breaks inside a WSGI application (4.32); the tests below ask every route without a key.
        "ignored_auth": {"enabled": False},
        "positive_data_acceptance": {"expected-statuses": ["2xx", "401", "403", "404", "409", "412"]},
    },
    "operations": [
        {"include-name": "POST /api/v1/jobs", "checks": REFUSES_MORE},
        {"include-name": "POST /v1/completions", "checks": {**REFUSES_MORE, **TAKES_MORE}},
        {"include-name": "POST /api/v1/models/{name}/deployments", "checks": REFUSES_MORE},
        # What is served may have been withdrawn.
        {"include-name": "GET /health/ready", "checks": {**REFUSES_MORE, "not_a_server_error": {"enabled": False}}},
        # One more header is no bad request.
        {"include-name": "GET /api/v1/jobs/{job_id}/events", "checks": TAKES_MORE},
        {"include-name": "PATCH /api/v1/models/{name}", "checks": REFUSES_MORE},
        # Names, passwords, scopes and rates are checked by the services, which say more about them than a schema can.
        {"include-name": "POST /api/v1/keys", "checks": REFUSES_MORE},
        {"include-name": "POST /api/v1/users", "checks": REFUSES_MORE},
        {"include-name": "PATCH /api/v1/users/{name}", "checks": REFUSES_MORE},
        {"include-name": "POST /api/v1/session", "checks": REFUSES_MORE},
    ],
}


@pytest.fixture
def app(settings: Settings, tmp_path: Path) -> APIFlask:
    """An application with one served model and one job that failed. No Redis, no worker.

    Version 1 is production and what an alias points to, version 2 is a canary that is loaded and was evaluated.
    """
    upgrade_database(settings)
    candidate = f"{MODEL}.canary"
    app = create_app(settings, FakeTriton({MODEL: word_by_word, candidate: word_by_word}, {candidate: [2]}))
    places = {place: ModelState(place.version, LOADED, 0.0) for place in (Place(MODEL, 1), Place(candidate, 2))}
    serving = ServingState({}, True, time.time(), places)
    serving_state.write(settings, serving)
    adapter = settings.model_repository / MODEL / "adapters" / ADAPTER
    adapter.mkdir(parents=True)
    (adapter / "adapter.json").write_text(json.dumps({"rank": 4, "base": {"digest": "0" * 64}}))
    seal(adapter, {}, {})
    with app.app_context():
        for number in (1, 2):
            folder = tmp_path / "exported" / str(number)
            folder.mkdir(parents=True)
            (folder / "model.json").write_text(json.dumps({"model": {"architecture": "Tiny"}, "number": number}))
            (folder / "certificate.json").write_text(json.dumps({"summary": {"passed": True}}))
            seal(folder, {"checkpoint": "tiny"}, {})
            services.register(MODEL, folder)
        deployments.adopt_production(MODEL, 1)
        aliases.set_own(MODEL, "stable", 1)
        deployments.deploy(MODEL, "canary", lambda: serving, number=2, weight=10.0)
        services.record_evaluation(MODEL, 2, "perplexity", {"bits": 1.0}, data=None, job_id=JOB, actor="system")
        create_user(MODEL, "a long enough password", "viewer")
        db.session.add(ApiKey(prefix=KEY, secret_sha256="", name="some key", role="viewer"))
        params = {"folder": "/version"}
        job = Job(
            id=JOB, kind="verify", params=params, queue="cpu", state=FAILED, created_by="system", finished_at=now()
        )
        db.session.add_all([job, JobEvent(job_id=JOB, attempt=1, event={"event": "ended", "state": FAILED})])
        db.session.commit()
    return app


def key(app: APIFlask, role: str) -> str:
    with app.app_context():
        return create_key(role, role)


def test_every_route_that_is_not_public_needs_a_key(app: APIFlask) -> None:
    for rule in app.url_map.iter_rules():
        if rule.rule in PUBLIC:
            continue
        path = re.sub(r"<(?:\w+:)?\w+>", "1", rule.rule)
        for method in METHODS:
            answer = app.test_client().open(path, method=method, data=b"{}", content_type="application/json")
            told = (method, path, answer.status_code)
            if (method, rule.rule) == LOGIN:
                assert answer.status_code == 400, told
            elif method == "OPTIONS":
                assert (answer.status_code, answer.data) == (200, b""), told
            elif method in rule.methods:
                assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer", told
            else:
                assert answer.status_code in (401, 405), told


@pytest.mark.parametrize("path", sorted(PUBLIC))
def test_a_public_route_answers_without_a_key_and_changes_nothing(app: APIFlask, path: str) -> None:
    (rule,) = [rule for rule in app.url_map.iter_rules() if rule.rule == path]
    assert rule.methods == {"GET", "HEAD", "OPTIONS"}
    with app.test_client().get(path.replace("<path:filename>", "nothing")) as answer:
        assert answer.status_code == (404 if rule.arguments else 200)


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Bearer x", "Bearer llmos_", "Basic bGxtb3M6eA==", "Bearer llmos_0_0", "\x00"]
)
def test_what_is_no_key_opens_nothing(app: APIFlask, header: str) -> None:
    for path in ("/api/v1/jobs", "/v1/models"):
        assert app.test_client().get(path, headers={"Authorization": header}).status_code == 401


@pytest.mark.parametrize("role", ROLES)
def test_every_operation_keeps_its_word(app: APIFlask, role: str) -> None:
    with watched():
        failures, statuses = run(app, role)
    assert "\n\n".join(failures) == ""
    document = app.test_client().get("/api/v1/openapi.json").json
    for path, item in document["paths"].items():
        for method, described in item.items():
            label = f"{method.upper()} {path}"
            found, has_success = statuses[label], any(200 <= status < 300 for status in statuses[label])
            if ROLES.index(role) < ROLES.index(described.get("x-role", ROLES[0])):
                assert 403 in found and not has_success, (label, found)
            else:
                assert 403 not in found or label in ASKS_FOR_MORE, (label, found)
                assert has_success or role != ROLES[-1] or path == SESSION, (label, found)


def thoroughness(role: str) -> dict[str, object]:
    """The highest role reaches everything, and tries most; the others are there for what they may not do."""
    is_highest = role == ROLES[-1]
    return {
        "generation": {"deterministic": True, "database": "none", "max-examples": 8 if is_highest else 4},
        "phases": {"coverage": {"enabled": is_highest}},
    }


def run(app: APIFlask, role: str) -> tuple[list[str], dict[str, set[int]]]:
    """What schemathesis found, and the statuses that every operation answered with."""
    headers = {"Authorization": f"Bearer {key(app, role)}"}
    config = schemathesis.Config.from_dict({**CONFIG, **thoroughness(role), "headers": headers})
    schema = schemathesis.openapi.from_wsgi("/api/v1/openapi.json", app, config=config)
    schema.hook(map_case)
    failures: list[str] = []
    statuses: dict[str, set[int]] = defaultdict(set)
    for event in from_schema(schema).execute():
        if isinstance(event, events.NonFatalError | events.FatalError):
            failures.append(str(event))
        if isinstance(event, events.ScenarioFinished):
            for case_id, checks in event.recorder.checks.items():
                case = event.recorder.cases[case_id].value
                failures += [
                    f"{case.operation.label}: {check.failure_info.failure.message}\n{check.failure_info.code_sample}"
                    for check in checks
                    if check.status == Status.FAILURE
                ]
            for case_id, interaction in event.recorder.interactions.items():
                operation = event.recorder.cases[case_id].value.operation
                # Methods that an operation does not have are tried under its name, too.
                if interaction.response is not None and interaction.request.method == operation.method.upper():
                    statuses[operation.label].add(interaction.response.status_code)
    return failures, statuses


def map_case(context: object, case: schemathesis.Case) -> schemathesis.Case:
    """Half of the well-formed names are those of something that is there: a name that was made up never is."""
    known = (("job_id", JOB_ID, JOB), ("name", NAME, MODEL), ("prefix", PREFIX, KEY))
    for name, pattern, existing in known:
        value = case.path_parameters.get(name)
        if isinstance(value, str) and pattern.fullmatch(value) and sum(value.encode()) % 2:
            case.path_parameters[name] = existing
    if case.method == "DELETE" and case.path_parameters.get("prefix") == OWN:
        # The key that asks would open nothing any more.
        case.path_parameters["prefix"] = KEY
    if case.path_parameters.get("name") == MODEL and ADAPTERS.fullmatch(str(case.path_parameters.get("adapter"))):
        # Two names that are both of something that is there would be rare.
        case.path_parameters["adapter"] = ADAPTER
    if isinstance(case.body, dict) and case.body.get("kind") == "withdraw":
        # Nothing would be served any more, and other operations would never succeed.
        case.body["kind"] = "abort"
    return case
