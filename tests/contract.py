"""Whether what an application answers is what its OpenAPI document says; every test's application is watched for it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jsonschema_rs
from flask import Flask, Response, request, request_finished

from control_plane.openapi.document import build_document

DESCRIBED = ("/api/v1/", "/v1/")
# They are for browsers: what they answer is the document itself, and its page.
UNDESCRIBED = ("/api/v1/openapi.json", "/api/v1/docs", "/api/v1/docs/<path:filename>")


@contextmanager
def watched() -> Iterator[None]:
    """Collects, from every application of this process, answers that differ from its document; fails if there are."""
    found: list[str] = []

    def check(app: Flask, response: Response, **_: Any) -> None:
        found.extend(f"{request.method} {request.path}: {text}" for text in violations(app, response))

    with request_finished.connected_to(check):
        yield
    assert not found, "\n".join(sorted(set(found)))


def violations(app: Flask, response: Response) -> list[str]:
    rule = request.url_rule
    if not request.path.startswith(DESCRIBED) or request.method == "OPTIONS" or 300 <= response.status_code < 400:
        return []
    if rule is None:
        # No such path, or not with this method: nobody's operation, but an error all the same.
        schema = "Problem" if request.path.startswith("/api/") else "Error"
        return _mismatches(app, {"$ref": f"#/components/schemas/{schema}"}, response.get_json())
    if rule.rule in UNDESCRIBED:
        return []
    path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
    method = "get" if request.method == "HEAD" else request.method.lower()
    described = _document(app)["paths"].get(path, {}).get(method)
    if described is None:
        return ["the document does not have it"]
    answer = described["responses"].get(str(response.status_code))
    if answer is None:
        return [f"status {response.status_code} is not described"]
    missing = [f"header {name} is missing" for name in answer.get("headers", ()) if name not in response.headers]
    content = answer["content"].get(response.mimetype)
    if not answer["content"]:
        return [*missing, *(["it has a body"] if response.data else [])]
    if content is None:
        return [*missing, f"media type {response.mimetype} is not described"]
    if "json" not in response.mimetype or request.method == "HEAD":
        return missing
    return [*missing, *_mismatches(app, content["schema"], response.get_json())]


def _mismatches(app: Flask, schema: dict[str, Any], content: Any) -> list[str]:
    whole = {**schema, "components": _document(app)["components"]}
    errors = jsonschema_rs.Draft202012Validator(whole, validate_formats=True).iter_errors(content)
    return [f"{error.message} at {error.instance_path}" for error in errors]


def _document(app: Flask) -> dict[str, Any]:
    if "openapi" not in app.extensions:
        app.extensions["openapi"] = build_document(app)
    return app.extensions["openapi"]
