"""Promote, roll back, canary, abort, retire: aliases, history and audit change together, or not at all."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import select

from control_plane import create_app
from control_plane.auth.tables import AuditEvent
from control_plane.client import ApiError, ControlPlane
from control_plane.errors import PreconditionFailed
from control_plane.extensions import db
from control_plane.jobs.tables import Job
from control_plane.registry import aliases as own_aliases
from control_plane.registry import deployments, services, serving_state
from control_plane.registry.places import Place
from control_plane.registry.serving_state import FAILED_TO_LOAD, LOADED, ModelState, ServingState
from control_plane.registry.tables import Alias
from control_plane.triton_fake import FakeTriton
from tests.unit.control_plane.registry.conftest import sealed

pytestmark = pytest.mark.unit
WARM = timedelta(minutes=10)


@pytest.fixture
def chat(app, tmp_path) -> None:
    """Versions 1 (production) to 3; 3 failed its proof."""
    for salt, passed in (("a", True), ("b", True), ("c", False)):
        services.register("chat", sealed(tmp_path / salt, salt, passed))
    deployments.adopt_production("chat", 1)


@pytest.fixture
def say(settings):
    """Write what the reconciler would."""

    def say(state: str, *places: Place, since: float | None = None) -> ServingState:
        at = time.time() + 1 if since is None else since
        states = {place: ModelState(place.version, state, at, "ModelLoadFailed", "why") for place in places}
        serving = ServingState({}, True, time.time(), states)
        serving_state.write(settings, serving)
        return serving

    return say


def refused(llmos: ControlPlane, status: int, said: str, *arguments, **options) -> None:
    with pytest.raises(ApiError, match=said) as error:
        llmos.deploy(*arguments, **options)
    assert error.value.status == status


def aliases(llmos: ControlPlane) -> dict[str, int]:
    return {alias["name"]: alias["version"] for alias in llmos.model("chat")["aliases"]}


def wanted() -> tuple[int | None, list[int]]:
    (intent,) = deployments.intents()
    return intent.production, sorted(intent.wanted)


def test_a_version_that_is_not_loaded_is_wanted_and_promoted_when_it_is(chat, llmos, say):
    found = llmos.deploy("chat", "promote", 2)
    assert (found["state"], aliases(llmos), wanted()) == ("InProgress", {"production": 1}, (1, [1, 2]))
    deployments.advance(say("Loading", Place("chat.canary", 2)), WARM)
    assert llmos.deployment("chat", found["id"])["state"] == "InProgress"
    deployments.advance(say(LOADED, Place("chat.canary", 2)), WARM)
    found = llmos.deployment("chat", found["id"])
    assert (found["state"], found["previous_version"]) == ("UpToDate", 1)
    assert (aliases(llmos), wanted()) == ({"production": 2}, (2, [1, 2])), "the one before stays warm"
    assert llmos.version("chat", 1)["warm_until"] is not None


def test_a_loaded_version_is_promoted_and_rolled_back_at_once(chat, llmos, say):
    say(LOADED, Place("chat", 1), Place("chat.canary", 2))
    assert llmos.deploy("chat", "promote", 2)["state"] == "UpToDate"
    assert llmos.deploy("chat", "rollback", reason="slow")["version"] == 1
    assert aliases(llmos) == {"production": 1}
    assert [(d["kind"], d["version"], d["previous_version"], d["reason"]) for d in llmos.deployments("chat")] == [
        ("rollback", 1, 2, "slow"),
        ("promote", 2, 1, None),
        ("promote", 1, None, "it was installed"),
    ]
    rows = db.session.execute(select(AuditEvent.action, AuditEvent.object_id, AuditEvent.details["version"]))
    moves = [tuple(row) for row in rows if row[0] == "alias.set"]
    assert moves == [("alias.set", "chat@production", number) for number in (1, 2, 1)]


def test_a_version_that_cannot_be_loaded_leaves_what_is_served(chat, llmos, say):
    found = llmos.deploy("chat", "promote", 2)
    deployments.advance(say(FAILED_TO_LOAD, Place("chat.canary", 2), since=time.time() - 60), WARM)
    assert llmos.deployment("chat", found["id"])["state"] == "InProgress", "that failure is from before"
    deployments.advance(say(FAILED_TO_LOAD, Place("chat.canary", 2)), WARM)
    found = llmos.deployment("chat", found["id"])
    assert (found["state"], found["failure"]) == (
        "BlockedByFailedLoad",
        {"reason": "ModelLoadFailed", "message": "why"},
    )
    assert (aliases(llmos), wanted()) == ({"production": 1}, (1, [1]))


def test_a_later_deployment_supersedes_one_that_waits(chat, connect, llmos, say):
    first = llmos.deploy("chat", "promote", 2)
    second = connect("admin").deploy("chat", "promote", 3, force=True, reason="a test of history")
    assert llmos.deployment("chat", first["id"])["state"] == "Superseded"
    deployments.advance(say(LOADED, Place("chat.canary", 2), Place("chat.canary", 3)), WARM)
    assert llmos.deployment("chat", second["id"])["state"] == "UpToDate"
    assert aliases(llmos) == {"production": 3}


def test_what_waits_is_superseded_in_the_transaction_of_what_comes_after(chat, llmos, monkeypatch):
    """Two rows in progress could end in any order."""
    first = llmos.deploy("chat", "promote", 2)
    monkeypatch.setattr(deployments, "advance", lambda *_: None)
    second = llmos.deploy("chat", "rollback", 2)
    states = [(found["id"], found["state"]) for found in llmos.deployments("chat")]
    assert states[:2] == [(second["id"], "InProgress"), (first["id"], "Superseded")]


def test_a_deployment_that_waits_can_be_called_off(chat, llmos, say, tmp_path):
    services.register("chat", sealed(tmp_path / "d", "d"))
    say(LOADED, Place("chat", 1), Place("chat.canary", 2))
    llmos.deploy("chat", "promote", 2)
    for kind, number in (("promote", 2), ("rollback", 2), ("rollback", None)):
        waiting = llmos.deploy("chat", "promote", 4)
        assert llmos.deploy("chat", kind, number)["state"] == "UpToDate"
        assert llmos.deployment("chat", waiting["id"])["state"] == "Superseded"
        assert (aliases(llmos), wanted()) == ({"production": 2}, (2, [1, 2]))
    waiting = llmos.deploy("chat", "canary", 4, weight=10)
    assert llmos.deploy("chat", "abort")["version"] == 4
    assert llmos.deployment("chat", waiting["id"])["state"] == "Superseded"
    assert (aliases(llmos), wanted()) == ({"production": 2}, (2, [1, 2]))
    assert llmos.deploy("chat", "rollback")["version"] == 1, "what was called off was never served"


def test_a_first_promotion_can_be_called_off(app, llmos, say, tmp_path):
    services.register("chat", sealed(tmp_path / "a", "a"))
    waiting = llmos.deploy("chat", "promote", 1)
    assert llmos.deploy("chat", "withdraw")["state"] == "UpToDate"
    deployments.advance(say(LOADED, Place("chat", 1)), WARM)
    assert llmos.deployment("chat", waiting["id"])["state"] == "Superseded"
    assert (aliases(llmos), deployments.intents()) == ({}, [])


def test_withdrawing_calls_off_everything_that_waits(chat, llmos, say):
    waiting = llmos.deploy("chat", "canary", 2, weight=10)
    llmos.deploy("chat", "withdraw")
    deployments.advance(say(LOADED, Place("chat.canary", 2)), WARM)
    assert llmos.deployment("chat", waiting["id"])["state"] == "Superseded"
    assert (aliases(llmos), deployments.intents()) == ({}, [])


def test_what_a_reconciler_that_is_gone_had_seen_promotes_nothing(chat, llmos, say, settings):
    serving = replace(say(LOADED, Place("chat.canary", 2)), updated_at=time.time() - 3600)
    serving_state.write(settings, serving)
    assert llmos.deploy("chat", "promote", 2)["state"] == "InProgress"


@pytest.mark.parametrize("state", ["CANCELLED", "FAILED"])
def test_a_deployment_whose_job_has_ended_is_given_up(chat, llmos, say, state):
    job = Job(kind="publish", params={}, queue="heavy", created_by="key:a", state="RUNNING")
    db.session.add(job)
    db.session.commit()
    waiting = deployments.deploy("chat", "promote", ServingState, number=2, job_id=job.id)
    deployments.advance(say("Loading", Place("chat.canary", 2)), WARM)
    assert waiting.state == "InProgress"
    job.state = state
    db.session.commit()
    deployments.advance(say(LOADED, Place("chat.canary", 2)), WARM)
    found = llmos.deployment("chat", waiting.id)
    assert (found["state"], found["failure"]["message"]) == ("Superseded", f"its job is {state}")
    assert (aliases(llmos), wanted()) == ({"production": 1}, (1, [1]))
    assert deployments.find_of_job(job.id) is None, "run again, it deploys again"


def test_every_alias_that_is_set_or_removed_is_audited(chat, llmos, say):
    say(LOADED, Place("chat", 1), Place("chat.canary", 2))
    llmos.deploy("chat", "canary", 2, weight=20)
    llmos.deploy("chat", "promote", 2)
    llmos.deploy("chat", "withdraw")
    rows = db.session.execute(select(AuditEvent.action, AuditEvent.object_id, AuditEvent.details, AuditEvent.actor))
    changes = [tuple(row) for row in rows if row[0].startswith("alias.")]
    who = changes[-1][3]
    assert who.startswith("key:")
    assert changes[1:] == [
        ("alias.set", "chat@canary", {"version": 2, "weight": 20.0}, who),
        ("alias.set", "chat@production", {"version": 2}, who),
        ("alias.delete", "chat@canary", {}, who),
        ("alias.delete", "chat@production", {}, who),
    ]


def test_canary_gets_another_weight_and_is_promoted_or_aborted(chat, llmos, say):
    say(LOADED, Place("chat", 1), Place("chat.canary", 2))
    refused(llmos, 409, "has no canary", "chat", "canary", weight=5)
    llmos.deploy("chat", "canary", 2, weight=20)
    llmos.deploy("chat", "canary", weight=0)
    (canary, production) = llmos.model("chat")["aliases"]
    assert (canary["version"], canary["weight"], production["version"]) == (2, 0, 1)
    llmos.deploy("chat", "abort")
    assert (aliases(llmos), wanted()) == ({"production": 1}, (1, [1]))
    llmos.deploy("chat", "canary", 2, weight=50)
    llmos.deploy("chat", "promote", 2)
    assert aliases(llmos) == {"production": 2}, "a promoted canary is none any more"


def test_a_model_that_is_withdrawn_is_not_served_nor_adopted_again(chat, llmos, say):
    say(LOADED, Place("chat", 1), Place("chat.canary", 2))
    llmos.deploy("chat", "promote", 2)
    llmos.deploy("chat", "withdraw", reason="replaced by another model")
    assert (aliases(llmos), deployments.intents()) == ({}, [])
    deployments.adopt_production("chat", 1)
    assert aliases(llmos) == {}
    refused(llmos, 409, "is not served", "chat", "withdraw")
    assert llmos.deploy("chat", "promote", 2)["previous_version"] is None


def test_nothing_unproven_is_served_but_by_an_admin_with_a_reason(chat, connect, llmos, say):
    say(LOADED, Place("chat.canary", 3))
    admin = connect("admin")
    for kind, more in (("promote", {}), ("canary", {"weight": 5})):
        refused(llmos, 409, "its certificate failed", "chat", kind, 3, **more)
        refused(llmos, 403, "needs the role 'admin'", "chat", kind, 3, force=True, reason="because I say so", **more)
        refused(admin, 400, "reason is missing", "chat", kind, 3, force=True, reason="   x", **more)
    found = admin.deploy("chat", "promote", 3, force=True, reason="measured by hand")
    assert found["overridden"] == ["its certificate failed: it is not equal to its checkpoint"]
    assert llmos.deployments("chat")[0]["reason"] == "measured by hand"


def test_thresholds_are_a_gate(chat, connect, llmos, say):
    say(LOADED, Place("chat.canary", 2))
    with pytest.raises(ApiError, match="needs the role 'admin'"):
        llmos.edit_model("chat", thresholds={})
    assert llmos.edit_model("chat", description="talks")["description"] == "talks"
    connect("admin").edit_model("chat", thresholds={"perplexity.bits_per_byte": {"max": 1.5}, "arc.acc": {"min": 0.3}})
    refused(llmos, 409, "perplexity.bits_per_byte was not measured; .*arc.acc was not measured", "chat", "promote", 2)
    measured = {"data": None, "job_id": "j", "actor": "test"}
    services.record_evaluation("chat", 2, "perplexity", {"bits_per_byte": 1.6}, **measured)
    services.record_evaluation("chat", 2, "arc", {"acc": 0.25}, **measured)
    refused(llmos, 409, "is 1.6; expected at most 1.5; arc.acc is 0.25; expected at least 0.3", "chat", "promote", 2)
    measured["job_id"] = "k"
    services.record_evaluation("chat", 2, "perplexity", {"bits_per_byte": 1.5}, **measured)
    services.record_evaluation("chat", 2, "perplexity", {"bits_per_byte": 9.0}, **measured)
    services.record_evaluation("chat", 2, "arc", {"acc": 0.5}, **measured)
    assert llmos.deploy("chat", "promote", 2)["state"] == "UpToDate"
    assert [each["metrics"] for each in llmos.evaluations("chat", 2)][-1] == {"bits_per_byte": 1.6}


def test_the_newest_value_of_each_metric_counts_though_runs_of_a_suite_measure_different_ones(
    chat, connect, llmos, say
):
    say(LOADED, Place("chat.canary", 2))
    thresholds = {"lm-eval.words/acc": {"min": 0.5}, "lm-eval.capitals/acc": {"min": 0.5}}
    connect("admin").edit_model("chat", thresholds=thresholds)
    for job_id, metrics in (("a", {"words/acc": 0.1}), ("b", {"words/acc": 0.9}), ("c", {"capitals/acc": 0.6})):
        services.record_evaluation("chat", 2, "lm-eval", metrics, data=None, job_id=job_id, actor="test")
    assert llmos.deploy("chat", "promote", 2)["state"] == "UpToDate"


def test_what_makes_no_sense_is_refused_with_its_reason(chat, llmos, say):
    refused(llmos, 409, "is production already", "chat", "promote", 1)
    refused(llmos, 409, "is production already", "chat", "canary", 1, weight=5)
    refused(llmos, 409, "has served no version before", "chat", "rollback")
    refused(llmos, 409, "has no canary", "chat", "abort")
    refused(llmos, 404, "has no version 9", "chat", "promote", 9)
    refused(llmos, 404, "does not exist", "nope", "promote", 1)
    refused(llmos, 400, "version is missing", "chat", "promote")
    refused(llmos, 400, "weight is the canary's", "chat", "promote", 2, weight=5)
    refused(llmos, 400, "weight is the canary's", "chat", "canary", 2)
    refused(llmos, 400, "kind is not as expected", "chat", "destroy", 2)
    for weight in (-1, 101):
        refused(llmos, 400, "weight", "chat", "canary", 2, weight=weight)
    assert len(llmos.deployments("chat")) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"kind": "promote", "version": "2"}',
        b'{"kind": "promote", "version": 0}',
        b'{"kind": "promote", "x": 1}',
    ],
)
def test_a_body_that_is_no_deployment_is_refused(chat, app, body):
    from control_plane.auth.services import create_key

    headers = {"Authorization": f"Bearer {create_key('o', 'operator')}"}
    assert app.test_client().post("/api/v1/models/chat/deployments", data=body, headers=headers).status_code == 400


def test_a_viewer_sees_and_a_developer_deploys_nothing(chat, connect):
    assert connect("viewer").deployments("chat")
    for role in ("viewer", "developer"):
        refused(connect(role), 403, "needs the role 'operator'", "chat", "promote", 2)


def test_two_people_cannot_promote_over_each_other(chat, llmos, say):
    say(LOADED, Place("chat", 1), Place("chat.canary", 2))
    revision = llmos.model("chat")["aliases"][0]["revision"]
    llmos.deploy("chat", "promote", 2, revision=revision)
    refused(llmos, 412, "chat@production is at revision 2, If-Match expects 1", "chat", "rollback", revision=revision)


def test_a_rollback_asks_the_gate_of_what_was_never_served(chat, llmos, say):
    say(LOADED, Place("chat", 1), Place("chat.canary", 2), Place("chat.canary", 3))
    refused(llmos, 409, "may not be served", "chat", "rollback", 3)
    llmos.deploy("chat", "promote", 2)
    assert llmos.deploy("chat", "rollback", 1)["state"] == "UpToDate"


def test_a_second_rollback_goes_on_to_what_was_served_before(chat, llmos, say, tmp_path):
    services.register("chat", sealed(tmp_path / "d", "d"))
    say(LOADED, Place("chat", 1), *(Place("chat.canary", number) for number in (2, 4)))
    for kind, number in (("promote", 2), ("promote", 4), ("rollback", None), ("rollback", None)):
        llmos.deploy("chat", kind, number)
    served = [deployment["version"] for deployment in llmos.deployments("chat")]
    assert served[:4] == [1, 2, 4, 2]
    refused(llmos, 409, "has served no version before", "chat", "rollback")


def test_if_match_expects_that_nobody_deploys(chat, llmos):
    llmos.deploy("chat", "promote", 2)
    refused(llmos, 412, "is in progress, If-Match expects that nobody deploys", "chat", "promote", 2, revision=1)
    assert llmos.deploy("chat", "promote", 2)["state"] == "InProgress"


def test_of_many_who_deploy_at_once_with_the_same_revision_one_does(settings, tmp_path):
    app = create_app(replace(settings, database_url_override=f"sqlite:///{tmp_path / 'llmos.db'}"), FakeTriton({}))
    with app.app_context():
        db.create_all()
        for salt in "ab":
            services.register("chat", sealed(tmp_path / salt, salt))
        deployments.adopt_production("chat", 1)
    together = threading.Barrier(6)

    def deploy(_: int) -> bool:
        with app.app_context():
            together.wait()
            try:
                deployments.deploy("chat", "promote", ServingState, number=2, revision=1)
            except PreconditionFailed:
                return False
            return True

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(deploy, range(6))) == 1


def test_an_alias_that_was_moved_since_it_was_read_is_not_moved_back(chat, llmos):
    llmos.set_alias("chat", "stable", 1)
    model, version = services.get_model("chat"), services.get_version("chat", 2)
    own_aliases.point(model, "stable", version, None, expected=1)
    with pytest.raises(PreconditionFailed, match="chat@stable was moved or removed just now"):
        own_aliases.point(model, "stable", version, None, expected=1)


def test_a_retired_version_is_not_served_and_a_served_one_not_retired(chat, llmos, say):
    with pytest.raises(ApiError, match="is production; move that first"):
        llmos.retire_version("chat", 1)
    waiting = llmos.deploy("chat", "promote", 2)
    with pytest.raises(ApiError, match="is being deployed"):
        llmos.retire_version("chat", 2)
    deployments.advance(say(FAILED_TO_LOAD, Place("chat.canary", 2)), WARM)
    assert llmos.deployment("chat", waiting["id"])["state"] == "BlockedByFailedLoad"
    assert llmos.retire_version("chat", 2)["retired_at"] is not None
    refused(llmos, 409, "is retired", "chat", "promote", 2)
    with pytest.raises(ApiError, match="is retired and never served again"):
        llmos.set_alias("chat", "stable", 2)


def test_aliases_of_ones_own_point_anywhere_and_those_of_deployments_are_moved_by_them(chat, llmos):
    assert llmos.set_alias("chat", "stable", 1)["revision"] == 1
    assert llmos.set_alias("chat", "stable", 2, revision=1)["version"] == 2
    with pytest.raises(ApiError, match="chat@stable is at revision 2, If-Match expects 1"):
        llmos.set_alias("chat", "stable", 1, revision=1)
    assert aliases(llmos) == {"production": 1, "stable": 2}
    for name, said in (
        ("production", "by deployments only"),
        ("7", "beginning with a letter"),
        ("Ä", "is not allowed"),
    ):
        with pytest.raises(ApiError, match=said):
            llmos.set_alias("chat", name, 1)
    llmos.delete_alias("chat", "stable")
    with pytest.raises(ApiError, match="has no alias"):
        llmos.delete_alias("chat", "stable")


def test_a_deployment_ends_once_whoever_advances_it(settings, tmp_path):
    """The web server and the reconciler both look, at the same time: each with a connection of its own."""
    app = create_app(replace(settings, database_url_override=f"sqlite:///{tmp_path / 'llmos.db'}"), FakeTriton({}))
    serving = ServingState({}, True, time.time(), {Place("chat.canary", 2): ModelState(2, LOADED, 0.0)})
    with app.app_context():
        db.create_all()
        for salt in "ab":
            services.register("chat", sealed(tmp_path / salt, salt))
        deployments.adopt_production("chat", 1)
        deployments.deploy("chat", "promote", ServingState, number=2)
    together = threading.Barrier(4)

    def advance() -> None:
        with app.app_context():
            together.wait()
            deployments.advance(serving, WARM)

    threads = [threading.Thread(target=advance) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with app.app_context():
        (alias,) = db.session.scalars(select(Alias)).all()
        assert (alias.version.number, alias.revision) == (2, 2)
        assert [deployment.state for deployment in deployments.history("chat", None, 9)] == ["UpToDate", "UpToDate"]
