"""The document, a page to browse it, and what that page is made of. All public: they say what could be asked."""

from __future__ import annotations

from pathlib import Path

import flask_swagger_ui
from apiflask import APIBlueprint
from flask import Response, current_app, jsonify, make_response, render_template, send_from_directory

from control_plane.openapi.document import build_document
from control_plane.responses import SECURITY_HEADERS

openapi = APIBlueprint("openapi", __name__, url_prefix="/api/v1", template_folder="templates")

SWAGGER_UI = Path(flask_swagger_ui.__file__).resolve().parent / "dist"
# Swagger UI's style sheet has its icons as data: images; nothing else of the policy is loosened.
DOCS_POLICY = f"{SECURITY_HEADERS['Content-Security-Policy']}; img-src 'self' data:"


@openapi.get("/openapi.json")
def show_document() -> Response:
    extensions = current_app.extensions
    if "openapi" not in extensions:
        extensions["openapi"] = build_document(current_app)
    return jsonify(extensions["openapi"])


@openapi.get("/docs")
def browse() -> Response:
    response = make_response(render_template("docs.html"))
    response.headers["Content-Security-Policy"] = DOCS_POLICY
    return response


@openapi.get("/docs/<path:filename>")
def docs_asset(filename: str) -> Response:
    return send_from_directory(SWAGGER_UI, filename)
