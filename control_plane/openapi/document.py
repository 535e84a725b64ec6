"""The OpenAPI 3.1 document, read off the application: its routes, their roles, and what ``Operation`` declares of them.

Nothing is written here twice. A view without a declaration is not in the document; a test fails for one under /api/v1
or /v1.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from flask import Flask
from werkzeug.http import HTTP_STATUS_CODES

from control_plane.auth.services import role_of
from control_plane.auth.sessions import COOKIE
from control_plane.errors import (
    BadRequest,
    ControlPlaneError,
    DatabaseUnavailable,
    Forbidden,
    NotFound,
    RateLimited,
    Unauthorized,
)
from control_plane.openapi.schemas import (
    COLLECTIONS,
    Components,
    Document,
    Error,
    Problem,
    markdown,
    parameters,
)
from control_plane.operations import EVENT_STREAM, Operation
from control_plane.responses import API_PREFIX, HTTP_CODES

ABOUT = "`x-role` is the lowest role that may call an operation. Operations without one are public."
SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "an API key: llmos_…"},
    "session": {
        "type": "apiKey",
        "in": "cookie",
        "name": COOKIE,
        "description": "somebody who is signed in; what changes something needs the header X-CSRF-Token, too",
    },
}
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
VARIABLE = re.compile(r"<(?:\w+:)?(\w+)>")
MEMBER = re.compile(rf"([\w-]+)/{VARIABLE.pattern}")
TOO_LARGE = 413
RETRY_AFTER = {"Retry-After": "after how many seconds to try again"}
ERROR_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: RETRY_AFTER, 503: RETRY_AFTER}


@dataclass(frozen=True)
class Route:
    """One path of a view; ``number`` counts the paths of the same view."""

    rule: str
    endpoint: str
    methods: tuple[str, ...]
    view: Callable[..., Any]
    declared: Operation
    number: int

    @property
    def path(self) -> str:
        return VARIABLE.sub(r"{\1}", self.rule)

    @property
    def operation_id(self) -> str:
        return self.endpoint.replace(".", "_") + (f"_{self.number}" if self.number > 1 else "")


def build_document(app: Flask) -> Document:
    routes = declared_routes(app)
    components = Components([route.declared for route in routes], app.extensions["job_kinds"])
    paths: dict[str, Document] = defaultdict(dict)
    for route in routes:
        for method in route.methods:
            paths[route.path][method.lower()] = _operation(route, components)
    return {
        "openapi": "3.1.0",
        "info": {"title": "llmos", "version": version("llmos"), "description": ABOUT},
        "paths": paths,
        "components": {"schemas": components.schemas, "securitySchemes": SECURITY_SCHEMES},
    }


def declared_routes(app: Flask) -> list[Route]:
    routes = []
    counted: Counter[str] = Counter()
    for rule in sorted(app.url_map.iter_rules(), key=lambda rule: rule.rule):
        view = app.view_functions[rule.endpoint]
        declared = Operation.of(view)
        if declared is not None:
            counted[rule.endpoint] += 1
            methods = tuple(method for method in METHODS if method in (rule.methods or ()))
            routes.append(Route(rule.rule, rule.endpoint, methods, view, declared, counted[rule.endpoint]))
    return routes


def _operation(route: Route, components: Components) -> Document:
    declared, role = route.declared, role_of(route.view)
    summary, _, description = markdown(route.view.__doc__).partition("\n\n")
    document: Document = {
        "operationId": route.operation_id,
        "tags": [route.endpoint.partition(".")[0]],
        "summary": " ".join(summary.replace("`", "").split()),
        "description": description,
        "security": [{name: []} for name in SECURITY_SCHEMES] if role else [],
        "parameters": [
            *_path_parameters(route.rule),
            *parameters(declared.query, "query"),
            *parameters(declared.headers, "header"),
        ],
        "responses": {**_answers(declared, components), **_errors(route, components)},
    }
    if role:
        document["x-role"] = role
    if body := declared.body or declared.reads:
        content = {"application/json": {"schema": components.body(body)}}
        document["requestBody"] = {"required": True, "content": content}
    return document


def _path_parameters(rule: str) -> list[Document]:
    return [
        {"name": name, "in": "path", "required": True, "schema": COLLECTIONS[collection]}
        for collection, name in MEMBER.findall(rule)
    ]


def _answers(declared: Operation, components: Components) -> Document:
    text = {"schema": {"type": "string"}}
    content: Document = {}
    if isinstance(declared.answer, str):
        content[declared.answer] = text
    elif declared.answer is not None:
        content["application/json"] = {"schema": components.answer(declared.answer)}
    if declared.has_stream:
        content[EVENT_STREAM] = text
    statuses = (declared.status, *declared.also)
    return {
        str(status): {
            "description": HTTP_STATUS_CODES[status],
            "content": content,
            "headers": _headers(declared.sends),
        }
        for status in statuses
    }


def _headers(descriptions: Mapping[str, str]) -> Document:
    return {
        name: {"description": description, "required": True, "schema": {"type": "string"}}
        for name, description in descriptions.items()
    }


def _errors(route: Route, components: Components) -> Document:
    """What the view raises, and what the key, the parameters and the path bring with them; by status."""
    declared = route.declared
    has_body = declared.body is not None or declared.reads is not None
    errors: list[type[ControlPlaneError]] = [ControlPlaneError, *declared.errors]
    if role_of(route.view) is not None:
        errors += [Unauthorized, Forbidden, RateLimited, DatabaseUnavailable]
    if has_body or declared.query or declared.headers:
        errors.append(BadRequest)
    if VARIABLE.search(route.rule):
        errors.append(NotFound)
    codes: dict[int, set[str]] = defaultdict(set)
    for error in errors:
        codes[error.status].add(f"`{error.code}`")
    if has_body:
        codes[TOO_LARGE].add(f"`{HTTP_CODES[TOO_LARGE]}`")
    is_api = route.rule.startswith(API_PREFIX)
    media_type, model = ("application/problem+json", Problem) if is_api else ("application/json", Error)
    content = {media_type: {"schema": components.answer(model)}}
    return {
        str(status): {
            "description": " or ".join(sorted(codes[status])),
            "content": content,
            "headers": _headers(ERROR_HEADERS.get(status, {})),
        }
        for status in sorted(codes)
    }
