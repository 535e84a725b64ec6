"""The OpenAPI document says everything about every operation, and its page needs nothing from outside."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
import schemathesis
from flask import Flask
from pydantic import BaseModel, ValidationError

from control_plane.auth.services import require_key, role_of
from control_plane.errors import Conflict
from control_plane.openapi.document import declared_routes
from control_plane.operations import Operation, Out
from control_plane.requests import PageQuery
from control_plane.responses import init_responses
from tests.contract import DESCRIBED, UNDESCRIBED

pytestmark = pytest.mark.unit


@pytest.fixture
def document(client):
    response = client.get("/api/v1/openapi.json", headers={"Authorization": ""})
    assert response.status_code == 200
    return response.json


def operations(document) -> list[tuple[str, dict]]:
    return [
        (f"{method} {path}", described)
        for path, item in document["paths"].items()
        for method, described in item.items()
    ]


def test_the_document_is_valid_openapi_3_1(document):
    assert document["openapi"] == "3.1.0"
    schemathesis.openapi.from_dict(document).validate()


def test_every_route_of_the_api_is_described(app):
    described = {route.rule for route in declared_routes(app)}
    routes = {rule.rule for rule in app.url_map.iter_rules() if rule.rule.startswith(DESCRIBED)}
    assert routes - described - {*UNDESCRIBED} == set()


def test_every_operation_has_a_summary_an_answer_and_its_errors(document):
    for name, described in operations(document):
        assert re.fullmatch(r"[A-Z].+\.?", described["summary"]), name
        assert any(status.startswith("2") for status in described["responses"]), name
        assert "500" in described["responses"], name
        assert set(re.findall(r"{(\w+)}", name)) == {p["name"] for p in described["parameters"] if p["in"] == "path"}
    ids = [described["operationId"] for _, described in operations(document)]
    assert len(ids) == len(set(ids))


def test_every_operation_names_the_role_that_its_view_asks_for(app, document):
    for route in declared_routes(app):
        for method in route.methods:
            described = document["paths"][route.path][method.lower()]
            assert described.get("x-role") == role_of(route.view)
            assert described["security"] == ([{"bearer": []}, {"session": []}] if role_of(route.view) else [])
            assert ("403" in described["responses"]) == ("x-role" in described)
            assert "401" in described["responses"] or "x-role" not in described


def test_errors_have_the_media_type_of_their_path(document):
    for name, described in operations(document):
        expected = "application/problem+json" if "/api/" in name else "application/json"
        errors = [answer for status, answer in described["responses"].items() if status[0] in "45"]
        if name != "get /health/ready":
            assert {media_type for answer in errors for media_type in answer["content"]} == {expected}, name


def test_every_schema_is_used_and_every_reference_leads_somewhere(document):
    references = set(re.findall(r'"\$ref": "#/components/schemas/([^"]+)"', json.dumps(document)))
    assert references == set(document["components"]["schemas"])


def test_a_submission_is_described_kind_by_kind(document):
    variants = document["components"]["schemas"]["JobIn"]["oneOf"]
    described = {variant["properties"]["kind"]["const"]: variant for variant in variants}
    assert sorted(described) == [
        "adapter",
        "evaluate",
        "export",
        "garbage-collect",
        "import",
        "pretrain",
        "publish",
        "verify",
    ]
    assert described["verify"]["properties"]["params"] == {"$ref": "#/components/schemas/VerifyParams"}
    assert "operator" in described["export"]["description"]


def test_parameters_are_those_that_are_enforced(document, client):
    (limit,) = (p for p in document["paths"]["/api/v1/jobs"]["get"]["parameters"] if p["name"] == "limit")
    assert limit["schema"] == {"type": "integer", "minimum": 1, "maximum": 200, "default": 50}
    assert client.get("/api/v1/jobs?limit=201").status_code == 400
    assert client.get("/api/v1/jobs?limit=200").status_code == 200


class Named(Out):
    name: str


class Filter(PageQuery):
    word: str


@pytest.fixture
def small(settings) -> Flask:
    app = Flask("small")
    app.extensions["job_kinds"] = {}
    init_responses(app, settings)

    @app.get("/api/v1/things")
    @Operation(Named, 203, query=Filter, errors=(Conflict,), sends={"X-Thing": "which"})
    def show(query: Filter):
        """A thing."""
        return {"name": query.word} if query.word != "extra" else {"name": "n", "more": 1}, {"X-Thing": "one"}

    return app


def test_what_is_declared_is_parsed_and_rendered(small):
    answer = small.test_client().get("/api/v1/things?word=a&limit=3")
    assert (answer.status_code, answer.json, answer.headers["X-Thing"]) == (203, {"name": "a"}, "one")


@pytest.mark.parametrize(
    ("query", "words"),
    [("", "word is missing"), ("word=a&limit=0", "limit has value '0'"), ("word=a&limit=٣", "limit has value '٣'")],
)
def test_what_is_not_as_declared_is_named(small, query, words):
    answer = small.test_client().get(f"/api/v1/things?{query}")
    assert answer.status_code == 400 and words in answer.json["detail"]


def test_an_answer_that_is_not_as_declared_is_our_own_mistake(small):
    assert small.test_client().get("/api/v1/things?word=extra").status_code == 500
    with pytest.raises(ValidationError):
        Named.model_validate({"name": 1})


def test_nothing_is_parsed_for_a_stranger(app):
    body = b"not even JSON"
    for route in declared_routes(app):
        if role_of(route.view):
            path = re.sub(r"{\w+}", "1", route.path)
            for method in route.methods:
                answer = app.test_client().open(f"{path}?limit=x", method=method, data=body)
                assert answer.status_code == 401, (method, path)


def test_a_declaration_survives_the_decorators_above_it():
    class Body(BaseModel):
        pass

    declared = Operation(Named, body=Body)

    def view() -> None:
        """Words."""

    decorated = require_key("operator")(declared(view))
    assert (Operation.of(decorated), role_of(decorated), decorated.__doc__) == (declared, "operator", "Words.")


class Assets(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
        assert tag != "style" and (tag != "script" or "src" in attributes), tag
        self.addresses += [attributes[name] for name in ("src", "href", "data-url") if name in attributes]


def test_the_page_is_made_of_our_own_files(client):
    page = client.get("/api/v1/docs")
    assert page.status_code == 200
    (policy,) = page.headers.getlist("Content-Security-Policy")
    assert "unsafe" not in policy and "http" not in policy
    addresses = Assets(page.get_data(as_text=True)).addresses
    assert len(addresses) == 5
    for address in addresses:
        with client.get(address) as asset:
            assert address.startswith("/") and asset.status_code == 200, address


@pytest.mark.parametrize(
    "path", ["../__init__.py", "..%2f__init__.py", "%2e%2e/__init__.py", "%2fetc/passwd", "", "%00"]
)
def test_only_files_of_the_page_are_given(client, path):
    assert client.get(f"/api/v1/docs/{path}", follow_redirects=True).status_code == 404


def test_other_pages_keep_the_strict_policy(client):
    for path in ("/", "/api/v1/openapi.json", "/api/v1/docs/swagger-ui.css"):
        with client.get(path) as answer:
            (policy,) = answer.headers.getlist("Content-Security-Policy")
            assert "data:" not in policy
