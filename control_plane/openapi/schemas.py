"""JSON Schemas of the document: of bodies and answers under a name, of parameters in place, and of errors."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, models_json_schema

from control_plane.auth.services import OWN, PREFIX
from control_plane.auth.users import MAX_NAME_LENGTH
from control_plane.auth.users import NAME as USER_NAME
from control_plane.jobs.kinds import JobKind
from control_plane.jobs.schemas import JobIn
from control_plane.jobs.services import JOB_ID
from control_plane.operations import Operation
from control_plane.registry.adapters import ADAPTER
from control_plane.registry.aliases import ALIAS
from control_plane.registry.model_directory import NAME

Document = dict[str, Any]

COLLECTIONS: dict[str, Document] = {
    "jobs": {"type": "string", "pattern": f"^{JOB_ID.pattern}$"},
    "models": {"type": "string", "pattern": f"^{NAME.pattern}$"},
    "versions": {"type": "integer", "minimum": 1},
    "adapters": {"type": "string", "pattern": f"^{ADAPTER.pattern}$"},
    "aliases": {"type": "string", "pattern": f"^{ALIAS.pattern}$"},
    "deployments": {"type": "integer", "minimum": 1},
    "keys": {"type": "string", "pattern": f"^({PREFIX.pattern}|{OWN})$"},
    "users": {"type": "string", "pattern": f"^{USER_NAME.pattern}$", "maxLength": MAX_NAME_LENGTH},
}
"""What may name a member of a collection, /jobs/<job_id>, as the service that looks for it checks."""
REFERENCE = "#/components/schemas/{model}"


class Problem(BaseModel):
    """An error under /api (RFC 9457). ``code`` is a word for programs, ``detail`` a sentence for people."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str | None


class ErrorDetails(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class Error(BaseModel):
    """An error elsewhere, as OpenAI's clients expect it."""

    error: ErrorDetails


class _Schemas(GenerateJsonSchema):
    """Without titles, which only repeat names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


class Components:
    """The schema of every body and answer under the name of its model, and the references to them."""

    def __init__(self, operations: Iterable[Operation], kinds: Mapping[str, JobKind]) -> None:
        wanted: list[tuple[type[BaseModel], JsonSchemaMode]] = [(Problem, "serialization"), (Error, "serialization")]
        wanted += [(kind.params, "validation") for kind in kinds.values()]
        for declared in operations:
            if isinstance(declared.answer, type):
                wanted.append((declared.answer, "serialization"))
            if body := declared.body or declared.reads:
                wanted.append((body, "validation"))
        wanted = sorted(set(wanted), key=lambda pair: pair[0].__name__)
        self._references, document = models_json_schema(wanted, ref_template=REFERENCE, schema_generator=_Schemas)
        self.schemas: Document = document["$defs"]
        for schema in self.schemas.values():
            if "description" in schema:
                schema["description"] = markdown(schema["description"])
        if (JobIn, "validation") in wanted:
            self.schemas[JobIn.__name__]["oneOf"] = [self._submission(name, kind) for name, kind in kinds.items()]

    def answer(self, model: type[BaseModel]) -> Document:
        return self._references[model, "serialization"]

    def body(self, model: type[BaseModel]) -> Document:
        return self._references[model, "validation"]

    def _submission(self, name: str, kind: JobKind) -> Document:
        """A job of this kind, with the schema of its parameters."""
        needs_params = any(field.is_required() for field in kind.params.model_fields.values())
        return {
            "description": f"{kind.purpose}; needs the role {kind.role}",
            "properties": {"kind": {"const": name}, "params": self.body(kind.params)},
            "required": ["kind", "params"] if needs_params else ["kind"],
        }


def parameters(model: type[BaseModel] | None, place: str) -> list[Document]:
    """The fields of a model of the query or of headers; one that was not sent is absent, never null."""
    if model is None:
        return []
    schema = model.model_json_schema(schema_generator=_Schemas)
    assert "$defs" not in schema, f"{model.__name__} has fields that are no plain values"
    required = schema.get("required", ())
    return [_parameter(name, place, field, name in required) for name, field in schema["properties"].items()]


def markdown(docstring: str | None) -> str:
    return inspect.cleandoc(docstring or "").replace("``", "`")


def _parameter(name: str, place: str, schema: Document, is_required: bool) -> Document:
    schema = dict(schema)
    parameter = {"name": name, "in": place, "required": is_required}
    if "description" in schema:
        parameter["description"] = schema.pop("description")
    if "anyOf" in schema:
        options = [option for option in schema["anyOf"] if option != {"type": "null"}]
        schema = options[0] if len(options) == 1 else {"anyOf": options}
    return {**parameter, "schema": schema}
