"""A typed client of the control plane's REST API, for programs and for the ``llmos`` command.

    with ControlPlane("http://127.0.0.1:8080", "llmos_…") as llmos:
        job = llmos.submit_job("export", {"checkpoint": "/models/tiny", "name": "chat"})
        for event in llmos.follow_job(job["id"]):
            print(event)

What the server refuses is raised as an ``ApiError`` that carries the server's own sentence, status and code.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx

from control_plane.api_answers import ApiError, Document, Unreachable, documents, error_of, refusal
from control_plane.errors import BadRequest

__all__ = ["ApiError", "ControlPlane", "Unreachable"]

TIMEOUT_S = 30.0
STREAM_TIMEOUT_S = 60.0
GENERATE_TIMEOUT_S = 600.0
RECONNECT_S = 1.0
POLL_S = 0.2
MAX_RECONNECTS = 30
ENDED = ("SUCCEEDED", "FAILED", "CANCELLED")
AWAY = (502, 503, 504)
"""Answers of a server, or of a proxy before it, that is not there at the moment."""
EVENT_STREAM = "text/event-stream"
COMPLETIONS = "/v1/completions"


class ControlPlane:
    """One connection pool to one server; use it as a context manager, or ``close`` it. Safe to share among threads.

    Raises BadRequest for an ``api_key`` that cannot be one.
    """

    def __init__(self, url: str, api_key: str, transport: httpx.BaseTransport | None = None) -> None:
        if not re.fullmatch(r"[!-~]+", api_key):
            raise BadRequest("the API key holds characters that no key has; copy it as llmos keys create printed it")
        self._url = url
        headers = {"Authorization": f"Bearer {api_key}"}
        # A proxy of the environment must never see a loopback address.
        self._http = httpx.Client(
            base_url=url, headers=headers, timeout=TIMEOUT_S, transport=transport, trust_env=False
        )

    def __enter__(self) -> ControlPlane:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def models(self, prefix: str | None = None) -> list[Document]:
        """Every model by name, with ``num_versions`` and its ``newest`` version."""
        params = {} if prefix is None else {"prefix": prefix}
        return self._pages("/api/v1/models", "after", "name", params)

    def model(self, name: str) -> Document:
        return self._ask("GET", _model_path(name))

    def edit_model(self, name: str, revision: int | None = None, **changes: Any) -> Document:
        """Change ``description`` or ``thresholds``.

        With the ``revision`` that was read, an edit that would undo somebody else's is refused (412).
        """
        return self._ask("PATCH", _model_path(name), json=changes, headers=_if_match(revision))

    def versions(self, name: str) -> list[Document]:
        """Every version of a model, newest first."""
        return self._pages(_model_path(name, "versions"), "before", "version", {})

    def version(self, name: str, number: int) -> Document:
        return self._ask("GET", _model_path(name, "versions", number))

    def retire_version(self, name: str, number: int) -> Document:
        """It is never served again."""
        return self._ask("POST", _model_path(name, "versions", number, "retire"))

    def set_alias(self, name: str, alias: str, version: int, revision: int | None = None) -> Document:
        body = {"version": version}
        return self._ask("PUT", _model_path(name, "aliases", alias), json=body, headers=_if_match(revision))

    def delete_alias(self, name: str, alias: str) -> None:
        self._ask("DELETE", _model_path(name, "aliases", alias))

    def deploy(
        self,
        name: str,
        kind: str,
        version: int | None = None,
        *,
        weight: float | None = None,
        reason: str | None = None,
        force: bool = False,
        revision: int | None = None,
    ) -> Document:
        """``kind`` is promote, rollback, canary, abort or withdraw; its ``state`` may still be InProgress.

        With the ``revision`` of the production alias, a deployment that somebody else came before is refused (412).
        """
        given = {"version": version, "weight": weight, "reason": reason}
        body = {"kind": kind, "force": force, **{key: value for key, value in given.items() if value is not None}}
        return self._ask("POST", _model_path(name, "deployments"), json=body, headers=_if_match(revision))

    def deployment(self, name: str, deployment_id: int) -> Document:
        return self._ask("GET", _model_path(name, "deployments", deployment_id))

    def deployments(self, name: str, limit: int = 50) -> list[Document]:
        """The newest ``limit`` deployments."""
        found: list[Document] = self._ask("GET", _model_path(name, "deployments"), params={"limit": limit})["data"]
        return found

    def wait_deployment(self, name: str, deployment_id: int, timeout_s: float = 600.0) -> Document:
        """Return when it is not InProgress any more; raises ApiError after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                found = self.deployment(name, deployment_id)
                if found["state"] != "InProgress":
                    return found
            except ApiError as error:
                # It goes on, whoever looks; a web server that is restarted answers again soon.
                if error.status not in AWAY or time.monotonic() > deadline:
                    raise
            if time.monotonic() > deadline:
                raise ApiError(f"deployment {deployment_id} is still InProgress after {timeout_s:g} s", 504, "timeout")
            time.sleep(POLL_S)

    def traffic(self, name: str, minutes: int = 5) -> Document:
        """What production and the canary met, ``recent`` and ``since_canary``."""
        return self._ask("GET", _model_path(name, "traffic"), params={"minutes": minutes})

    def evaluations(self, name: str, version: int | None = None) -> list[Document]:
        """What was measured of a model's versions, newest first."""
        params = {} if version is None else {"version": version}
        return self._pages(_model_path(name, "evaluations"), "before", "id", params)

    def adapters(self, name: str) -> list[Document]:
        """LoRA adapters by name, each with its rank, size and the version that it fits."""
        found: list[Document] = self._ask("GET", _model_path(name, "adapters"))["data"]
        return found

    def put_adapter(
        self, name: str, adapter: str, peft_folder: str, version: int | None = None, *, other_base: bool = False
    ) -> Document:
        """Install or replace an adapter from a folder on the server; gives the job that does it."""
        body = {
            "peft_folder": peft_folder,
            "other_base": other_base,
            **({} if version is None else {"version": version}),
        }
        return self._ask("PUT", _model_path(name, "adapters", adapter), json=body)

    def delete_adapter(self, name: str, adapter: str) -> None:
        self._ask("DELETE", _model_path(name, "adapters", adapter))

    def complete(self, model: str, prompt: str, *, stream: bool = True, **params: Any) -> Iterator[str]:
        """The text of one answer, as it is generated or all at once; ``params`` are those of ``/v1/completions``."""
        body = {"model": model, "prompt": prompt, "stream": stream, **params}
        if not stream:
            yield self._ask("POST", COMPLETIONS, json=body, timeout=GENERATE_TIMEOUT_S)["choices"][0]["text"]
            return
        try:
            for chunk in self._stream("POST", COMPLETIONS, json=body, timeout=GENERATE_TIMEOUT_S):
                if "error" in chunk:
                    raise refusal(chunk, 502)
                yield from (choice["text"] for choice in chunk["choices"])
        except httpx.TransportError as error:
            raise self._no_answer(error) from None

    def system(self) -> Document:
        """Processes, workers, Triton, database, Redis, disks and memory."""
        return self._ask("GET", "/api/v1/system")

    def artifacts(self) -> list[Document]:
        """Everything in the artifact store, by digest, with who needs it."""
        return self._pages("/api/v1/artifacts", "after", "digest", {})

    def collect_garbage(self, dry_run: bool = False) -> Document:
        """Submit the job that removes what nobody needs; with ``dry_run`` it only says what that is."""
        return self.submit_job("garbage-collect", {"dry_run": dry_run})

    def import_checkpoint(self, source: str, name: str, *, idempotency_key: str | None = None) -> Document:
        """Submit the job that makes a folder or a Hub model a checkpoint of this installation."""
        return self.submit_job("import", {"source": source, "name": name}, idempotency_key=idempotency_key)

    def publish(
        self,
        checkpoint: str,
        name: str,
        *,
        evaluate: Mapping[str, str | None] | None = None,
        deploy: str = "none",
        weight: float | None = None,
        idempotency_key: str | None = None,
        **options: Any,
    ) -> Document:
        """Submit the job that makes a checkpoint the next version of a model.

        ``evaluate`` maps suites to the file that each reads; ``deploy`` is none, canary (with ``weight``) or promote;
        ``options`` are the other parameters of the kind ``export``.
        """
        given = {"evaluate": evaluate, "weight": weight, **options}
        params = {"checkpoint": checkpoint, "name": name, "deploy": deploy}
        params |= {key: value for key, value in given.items() if value is not None}
        return self.submit_job("publish", params, idempotency_key=idempotency_key)

    def evaluate(
        self,
        name: str,
        version: int | str | None = None,
        *,
        suite: str,
        data: str | list[str] | None = None,
        limit: int | None = None,
        idempotency_key: str | None = None,
    ) -> Document:
        """Submit the job that measures a version: a number, an alias, or None for the newest."""
        given = {"name": name, "version": version, "suite": suite, "data": data, "limit": limit}
        params = {key: value for key, value in given.items() if value is not None}
        return self.submit_job("evaluate", params, idempotency_key=idempotency_key)

    def job_kinds(self) -> list[Document]:
        """Name, purpose, role, steps and JSON schema of the parameters of every kind."""
        found: list[Document] = self._ask("GET", "/api/v1/job-kinds")["data"]
        return found

    def submit_job(
        self, kind: str, params: Mapping[str, Any], *, priority: int = 0, idempotency_key: str | None = None
    ) -> Document:
        headers = {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}
        body = {"kind": kind, "params": dict(params), "priority": priority}
        return self._ask("POST", "/api/v1/jobs", json=body, headers=headers)

    def job(self, job_id: str) -> Document:
        return self._ask("GET", f"/api/v1/jobs/{job_id}")

    def jobs(self, kind: str | None = None, state: str | None = None, limit: int = 50) -> list[Document]:
        """The newest ``limit`` jobs."""
        given = {"kind": kind, "state": state, "limit": limit}
        params = {name: value for name, value in given.items() if value is not None}
        found: list[Document] = self._ask("GET", "/api/v1/jobs", params=params)["data"]
        return found

    def cancel_job(self, job_id: str) -> Document:
        return self._ask("POST", f"/api/v1/jobs/{job_id}/cancel")

    def retry_job(self, job_id: str) -> Document:
        return self._ask("POST", f"/api/v1/jobs/{job_id}/retry")

    def job_events(self, job_id: str, after: int = 0) -> list[Document]:
        """All events so far with an id above ``after``."""
        return self._pages(f"/api/v1/jobs/{job_id}/events", "after", "id", {"after": after})

    def last_event_id(self, job_id: str) -> int:
        """Of a job's events so far; 0 if there are none."""
        found = self._ask("GET", f"/api/v1/jobs/{job_id}/events", params={"newest": "true", "limit": 1})["data"]
        return max((event["id"] for event in found), default=0)

    def follow_job(self, job_id: str, after: int = 0) -> Iterator[Document]:
        """Events of a job as they come, until it has ended; a connection that breaks is taken up where it was."""
        reconnects = 0
        while True:
            try:
                for event in self._events(job_id, after):
                    after, reconnects = event["id"], 0
                    yield event
                # A stream also ends when it has lasted long enough for the server.
                if self.job(job_id)["state"] in ENDED:
                    return
            except (httpx.TransportError, ApiError) as error:
                if isinstance(error, ApiError) and error.status not in AWAY:
                    raise
                reconnects += 1
                if reconnects > MAX_RECONNECTS:
                    raise error if isinstance(error, ApiError) else self._no_answer(error) from None
                time.sleep(RECONNECT_S)

    def keys(self) -> list[Document]:
        """Every API key, newest first, revoked ones too; never a secret."""
        return self._pages("/api/v1/keys", "before", "prefix", {})

    def key(self, prefix: str = "self") -> Document:
        return self._ask("GET", f"/api/v1/keys/{quote(prefix, safe='')}")

    def create_key(self, name: str, role: str = "developer", **limits: Any) -> Document:
        """``limits``: scopes, models, requests_per_minute, tokens_per_minute, expires_at (ISO 8601 with a zone).

        ``key`` of the answer is the key itself, which cannot be had again.
        """
        given = {limit: value for limit, value in limits.items() if value is not None}
        return self._ask("POST", "/api/v1/keys", json={"name": name, "role": role, **given})

    def revoke_key(self, prefix: str) -> Document:
        return self._ask("DELETE", f"/api/v1/keys/{quote(prefix, safe='')}")

    def users(self) -> list[Document]:
        return self._pages("/api/v1/users", "after", "name", {})

    def user(self, name: str) -> Document:
        return self._ask("GET", f"/api/v1/users/{quote(name, safe='')}")

    def create_user(self, name: str, password: str, role: str = "viewer") -> Document:
        return self._ask("POST", "/api/v1/users", json={"name": name, "password": password, "role": role})

    def edit_user(self, name: str, revision: int | None = None, **changes: Any) -> Document:
        """``changes``: role, is_active, password. With the ``revision`` that was read, as for ``describe_model``."""
        headers = {} if revision is None else {"If-Match": f'"{revision}"'}
        return self._ask("PATCH", f"/api/v1/users/{quote(name, safe='')}", json=changes, headers=headers)

    def audit(
        self, actor: str | None = None, action: str | None = None, object_id: str | None = None, limit: int = 50
    ) -> list[Document]:
        """The newest ``limit`` changes by one actor, of one kind, of one object."""
        given = {"actor": actor, "action": action, "object": object_id, "limit": limit}
        params = {name: value for name, value in given.items() if value is not None}
        found: list[Document] = self._ask("GET", "/api/v1/audit", params=params)["data"]
        return found

    def _pages(self, path: str, cursor: str, key: str, params: Mapping[str, Any]) -> list[Document]:
        """All pages of a list whose next page begins behind ``key`` of the last row."""
        rows: list[Document] = []
        while True:
            place = {cursor: rows[-1][key]} if rows else {}
            page = self._ask("GET", path, params={**params, **place, "limit": 200})
            rows += page["data"]
            if not page["has_more"]:
                return rows

    def _events(self, job_id: str, after: int) -> Iterator[Document]:
        headers = {"Accept": EVENT_STREAM, "Last-Event-ID": str(after)}
        return self._stream("GET", f"/api/v1/jobs/{job_id}/events", headers=headers, timeout=STREAM_TIMEOUT_S)

    def _stream(self, method: str, path: str, **options: Any) -> Iterator[Document]:
        """The documents of an event stream; an error in it is raised."""
        with self._http.stream(method, path, **options) as response:
            if response.is_error:
                response.read()
                raise error_of(response)
            yield from documents(response)

    def _ask(self, method: str, path: str, **options: Any) -> Document:
        try:
            response = self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise self._no_answer(error) from None
        if response.is_error:
            raise error_of(response)
        try:
            document: Document = response.json() if response.content else {}
        except ValueError:
            message = f"{response.request.url} answered, but not with JSON; is it llmos that listens there?"
            raise ApiError(message, response.status_code, "http_error") from None
        return document

    def _no_answer(self, error: httpx.TransportError) -> ApiError:
        if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
            return Unreachable(f"no llmos answers at {self._url} ({error}); start it with llmos up", 503, "unreachable")
        message = (
            f"llmos at {self._url} gave no answer ({error}); what was asked may have been done: look, then try again"
        )
        return ApiError(message, 504, "no_answer")


def _model_path(name: str, *parts: str | int) -> str:
    return "/".join(("/api/v1/models", *(quote(str(part), safe="") for part in (name, *parts))))


def _if_match(revision: int | None) -> dict[str, str]:
    return {} if revision is None else {"If-Match": f'"{revision}"'}
