"""Jobs over the REST API and its client: roles, pages, errors as problem details. No worker runs here."""

from __future__ import annotations

import httpx
import pytest
from sqlalchemy import select

from control_plane.auth.services import create_key
from control_plane.auth.tables import AuditEvent
from control_plane.client import ApiError, ControlPlane
from control_plane.extensions import db
from control_plane.jobs.tables import SUCCEEDED, Job, JobEvent

pytestmark = pytest.mark.unit

EVALUATE = {"name": "chat", "suite": "certificate"}
EXPORT = {"checkpoint": "/models/tiny", "name": "chat"}


@pytest.fixture
def connect(app):
    def connect(role: str) -> ControlPlane:
        with app.app_context():
            key = create_key(role, role)
        return ControlPlane("http://llmos", key, transport=httpx.WSGITransport(app))

    return connect


@pytest.fixture
def llmos(connect):
    return connect("operator")


def test_a_job_is_submitted_shown_listed_and_cancelled_and_each_change_is_audited(app, llmos):
    job = llmos.submit_job("export", EXPORT, priority=3)
    assert (job["state"], job["queue"], job["priority"]) == ("QUEUED", "cpu", 3)
    assert job["params"]["precision"] == "fp32"
    assert llmos.job(job["id"]) == job
    assert [found["id"] for found in llmos.jobs(kind="export", state="QUEUED")] == [job["id"]]
    assert llmos.jobs(kind="verify") == []
    assert llmos.cancel_job(job["id"])["state"] == "CANCELLED"
    assert llmos.retry_job(job["id"])["state"] == "QUEUED"
    with app.app_context():
        rows = db.session.scalars(select(AuditEvent).where(AuditEvent.object_id == job["id"]).order_by(AuditEvent.id))
        found = [(row.action, row.actor) for row in rows]
    assert [action for action, _ in found] == ["job.submit", "job.cancel", "job.retry"]
    assert {actor for _, actor in found} == {job["created_by"]}
    assert job["created_by"].startswith("key:")


def test_submitting_answers_202_with_the_place_of_the_job(client, app):
    with app.app_context():
        client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {create_key('o', 'operator')}"
    answer = client.post("/api/v1/jobs", json={"kind": "export", "params": EXPORT})
    assert answer.status_code == 202
    assert client.get(answer.headers["Location"]).json == answer.json


def test_the_same_key_gives_the_same_job(llmos):
    first = llmos.submit_job("export", EXPORT, idempotency_key="once")
    assert llmos.submit_job("export", EXPORT, idempotency_key="once")["id"] == first["id"]
    with pytest.raises(ApiError, match="use a new key") as refused:
        llmos.submit_job("export", {**EXPORT, "name": "other"}, idempotency_key="once")
    assert (refused.value.status, refused.value.code) == (409, "conflict")


@pytest.mark.parametrize(
    ("role", "kind", "is_allowed"),
    [
        ("viewer", "pretrain", False),
        ("developer", "pretrain", True),
        ("developer", "export", False),
        ("developer", "verify", False),
        ("operator", "export", True),
        ("admin", "export", True),
        ("developer", "evaluate", False),
    ],
)
def test_a_kind_needs_its_role(connect, role, kind, is_allowed):
    params = {"export": EXPORT, "verify": {"folder": "/v"}, "pretrain": {"name": "tiny"}, "evaluate": EVALUATE}[kind]
    if is_allowed:
        assert connect(role).submit_job(kind, params)["state"] == "QUEUED"
    else:
        with pytest.raises(ApiError, match="role") as refused:
            connect(role).submit_job(kind, params)
        assert refused.value.status == 403


def test_cancel_and_retry_need_an_operator(connect, llmos):
    job_id = llmos.submit_job("export", EXPORT)["id"]
    for call in (connect("developer").cancel_job, connect("developer").retry_job):
        with pytest.raises(ApiError) as refused:
            call(job_id)
        assert refused.value.status == 403


def test_what_is_made_for_cuda_waits_for_a_worker_beside_a_gpu(app, llmos):
    made = [llmos.submit_job("export", {**EXPORT, **extra})["id"] for extra in ({}, {"device": "cuda"})]
    with app.app_context():
        assert [db.session.get(Job, job_id).queue for job_id in made] == ["cpu", "gpu"]


def test_kinds_show_their_parameters_as_a_schema(llmos):
    kinds = {kind["name"]: kind for kind in llmos.job_kinds()}
    assert sorted(kinds) == [
        "adapter",
        "evaluate",
        "export",
        "garbage-collect",
        "import",
        "pretrain",
        "publish",
        "verify",
    ]
    assert kinds["export"]["params"]["required"] == ["checkpoint", "name"]
    assert kinds["pretrain"]["params"]["properties"]["max_steps"]["default"] == 320


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"name": "chat"}, "params.checkpoint"),
        ({**EXPORT, "precision": "fp7"}, "params.precision has value 'fp7'"),
        ({**EXPORT, "name": "../etc"}, "params.name has value '../etc'"),
        ({**EXPORT, "name": "chat\n"}, "params.name"),
        ({**EXPORT, "name": "с" + "hat"}, "params.name"),  # a Cyrillic letter
        ({**EXPORT, "name": "x" * 300}, "params.name"),
        ({**EXPORT, "checkpoint": "a\0b"}, "without NUL"),
        ({**EXPORT, "checkpoint": "x" * 2000}, "params.checkpoint"),
        ({**EXPORT, "max_model_len": 0}, "params.max_model_len has value 0"),
        ({**EXPORT, "max_model_len": "many"}, "params.max_model_len"),
        ({**EXPORT, "max_model_len": "5"}, "params.max_model_len has value '5'"),
        ({**EXPORT, "max_model_len": True}, "params.max_model_len has value True"),
        ({**EXPORT, "out": "/etc"}, "params.out"),
        ({**EXPORT, "engine": {"a\0b": 1}}, "params.engine.keys has value 'a"),
        ({**EXPORT, "engine": {"a=b": 1}}, "params.engine.keys has value 'a=b'"),
        ({**EXPORT, "engine": {"": 1}}, "params.engine.keys has value ''"),
        ({**EXPORT, "engine": {"x" * 65: 1}}, "params.engine.keys has value 'x"),
    ],
)
def test_bad_parameters_are_named_and_nothing_is_stored(app, llmos, params, words):
    with pytest.raises(ApiError, match=words.replace(".", r"\.")) as refused:
        llmos.submit_job("export", params)
    assert (refused.value.status, refused.value.code) == (400, "invalid_request")
    with app.app_context():
        assert db.session.scalar(select(Job.id)) is None


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"suite": "perplexity"}, "perplexity needs data"),
        ({"suite": "perplexity", "data": ["a", "b"]}, "perplexity reads one file; data has 2"),
        ({"suite": "certificate", "data": "a"}, "leave data and limit out"),
        ({"suite": "certificate", "limit": 3}, "leave data and limit out"),
        ({"suite": "lm-eval"}, "lm-eval needs data"),
        ({"suite": "mmlu"}, "params.suite has value 'mmlu'"),
        ({"suite": "certificate", "version": 0}, "params.version"),
        ({"suite": "certificate", "version": True}, "params.version"),
    ],
)
def test_an_evaluation_needs_what_its_suite_reads(llmos, params, words):
    with pytest.raises(ApiError, match=words) as refused:
        llmos.submit_job("evaluate", {"name": "chat", **params})
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"deploy": "canary"}, "weight is the canary's percentage"),
        ({"deploy": "promote", "weight": 20.0}, "weight is the canary's percentage"),
        ({"deploy": "canary", "weight": 101.0}, "params.weight has value 101.0"),
        ({"deploy": "rollback"}, "params.deploy has value 'rollback'"),
        ({"evaluate": {"perplexity": None}}, "evaluate.perplexity has value None"),
        ({"evaluate": {"certificate": "/a"}}, "evaluate.certificate has value '/a'"),
        ({"evaluate": {"lm-eval": "/a"}}, "params.evaluate.keys has value 'lm-eval'"),
    ],
)
def test_a_publication_is_complete_before_it_begins(llmos, params, words):
    with pytest.raises(ApiError, match=words) as refused:
        llmos.publish("/models/tiny", "chat", **params)
    assert refused.value.status == 400
    assert llmos.publish("/models/tiny", "chat", precision="int8", deploy="canary", weight=0)["state"] == "QUEUED"


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"kind": 1}', b'{"kind": "export", "extra": 1}', b'"\\ud800"', b"\xff", b"[" * 60_000]
)
def test_a_bad_body_is_a_problem_document(client, body):
    answer = client.post("/api/v1/jobs", data=body, content_type="application/json")
    assert answer.status_code == 400
    assert answer.mimetype == "application/problem+json"
    assert set(answer.json) == {"type", "title", "status", "detail", "code", "request_id"}
    assert answer.json["request_id"] == answer.headers["X-Request-Id"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_json_cannot_say_is_not_stored(client, number):
    body = f'{{"kind": "pretrain", "params": {{"name": "tiny", "learning_rate": {number}}}}}'
    answer = client.post("/api/v1/jobs", data=body)
    assert answer.status_code == 400 and "params.learning_rate" in answer.json["detail"]


@pytest.mark.parametrize("priority", ["3.0", "3", "-100"])
def test_a_whole_number_may_be_written_with_a_point(client, priority):
    body = f'{{"kind": "pretrain", "params": {{"name": "tiny"}}, "priority": {priority}}}'
    assert client.post("/api/v1/jobs", data=body).json["priority"] == float(priority)


@pytest.mark.parametrize("priority", ["3.5", '"3"', "true", "101", "1e30"])
def test_a_priority_that_is_none_is_refused(client, priority):
    body = f'{{"kind": "pretrain", "params": {{"name": "tiny"}}, "priority": {priority}}}'
    assert client.post("/api/v1/jobs", data=body).status_code == 400


@pytest.mark.parametrize("job_id", ["0", "..", "%2e%2e", "x" * 300, "' OR 1=1 --", "%00"])
def test_a_job_that_is_not_there_is_404(client, job_id):
    for path in (f"/api/v1/jobs/{job_id}", f"/api/v1/jobs/{job_id}/events"):
        assert client.get(path).status_code == 404


@pytest.mark.parametrize("query", ["limit=0", "limit=201", "limit=x", "limit=-1", "state=done", "before=nothing"])
def test_a_bad_query_is_refused(client, query):
    assert client.get(f"/api/v1/jobs?{query}").status_code in (400, 404)


def test_without_a_key_nothing_is_told(app):
    for method, path in (("GET", "/api/v1/jobs"), ("POST", "/api/v1/jobs"), ("GET", "/api/v1/job-kinds")):
        answer = app.test_client().open(path, method=method)
        assert (answer.status_code, answer.json["code"]) == (401, "invalid_api_key")


def test_pages_cover_every_job_once(client, llmos):
    ids = [llmos.submit_job("export", {**EXPORT, "name": f"m{i}"})["id"] for i in range(7)]
    seen, before = [], ""
    while True:
        page = client.get(f"/api/v1/jobs?limit=3{before}").json
        seen += [job["id"] for job in page["data"]]
        if not page["has_more"]:
            break
        before = f"&before={seen[-1]}"
    assert seen == ids[::-1]


def test_the_newest_events_are_the_last_ones_in_order(app, client, llmos):
    job_id = llmos.submit_job("export", EXPORT)["id"]
    assert llmos.last_event_id(job_id) == 0
    with app.app_context():
        db.session.add_all(JobEvent(job_id=job_id, attempt=1, event={"event": "log", "n": n}) for n in range(5))
        db.session.commit()
    page = client.get(f"/api/v1/jobs/{job_id}/events?newest=true&limit=2").json
    assert [event["n"] for event in page["data"]] == [3, 4]
    assert llmos.last_event_id(job_id) == page["data"][-1]["id"]


def test_an_ended_job_is_not_cancelled(app, llmos):
    job_id = llmos.submit_job("export", EXPORT)["id"]
    with app.app_context():
        db.session.get(Job, job_id).state = SUCCEEDED
        db.session.commit()
    with pytest.raises(ApiError, match="has ended already") as refused:
        llmos.cancel_job(job_id)
    assert refused.value.status == 409


def test_a_server_that_is_away_is_one_sentence():
    with (
        ControlPlane("http://127.0.0.1:1", "llmos_x") as llmos,
        pytest.raises(ApiError, match="start it with llmos up"),
    ):
        llmos.jobs()


def test_event_streams_leave_web_threads_to_others(app, client, llmos):
    job_id = llmos.submit_job("export", EXPORT)["id"]
    slots = app.extensions["event_stream_slots"]
    while slots.acquire(blocking=False):
        pass
    answer = client.get(f"/api/v1/jobs/{job_id}/events", headers={"Accept": "text/event-stream"})
    assert (answer.status_code, answer.json["code"]) == (503, "overloaded")
    slots.release()
    llmos.cancel_job(job_id)
    with client.get(f"/api/v1/jobs/{job_id}/events", headers={"Accept": "text/event-stream"}) as stream:
        assert stream.status_code == 200
    assert slots.acquire(blocking=False)


def test_a_job_is_followed_across_a_restart_of_the_server():
    calls: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        calls.append(f"{request.url.path} {request.headers.get('Last-Event-ID')}")
        if len(calls) in (2, 3):
            raise httpx.ConnectError("refused")
        if not request.url.path.endswith("/events"):
            return httpx.Response(200, json={"state": "SUCCEEDED"})
        number = 1 if len(calls) == 1 else 2
        return httpx.Response(200, text=f'id: {number}\ndata: {{"id": {number}, "event": "progress"}}\n\n')

    with ControlPlane("http://llmos", "llmos_x", transport=httpx.MockTransport(answer)) as llmos:
        assert [event["id"] for event in llmos.follow_job("j")] == [1, 2]
    assert calls == [
        "/api/v1/jobs/j/events 0",
        "/api/v1/jobs/j None",
        "/api/v1/jobs/j/events 1",
        "/api/v1/jobs/j/events 1",
        "/api/v1/jobs/j None",
    ]


def test_what_is_no_llmos_is_said():
    transport = httpx.MockTransport(lambda request: httpx.Response(502, text="<html>"))
    llmos = ControlPlane("http://llmos", "llmos_x", transport=transport)
    with llmos, pytest.raises(ApiError, match="answered 502"):
        llmos.jobs()
