"""What /v1 answers, in the words of OpenAI's API; shown by the OpenAPI document and checked by the tests.

The bodies themselves are made by ``services`` and ``openai_format``, piece by piece as they are streamed.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from control_plane.operations import Out


class ModelObject(Out):
    """A model that is ready; ``created`` is a Unix time."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None


class ModelList(Out):
    object: Literal["list"]
    data: list[ModelObject]


class Logprobs(Out):
    """Four lists with one entry per token; an echoed prompt's first token has no probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(Out):
    logprob: float
    rank: int
    decoded_token: str


class CompletionChoice(Out):
    """``token_ids`` and ``prompt_token_ids`` are there if ``return_token_ids`` asked for them, ``prompt_logprobs`` if
    the parameter of that name did: by token id, and null for the first token. A stream tells of the prompt once, in a
    choice's first chunk.
    """

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: str | None
    token_ids: list[int] = Field(default_factory=list)
    prompt_token_ids: list[int] = Field(default_factory=list)
    prompt_logprobs: list[dict[str, PromptLogprob] | None] = Field(default_factory=list)


class PromptTokensDetails(Out):
    cached_tokens: int


class UsageObject(Out):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionObject(Out):
    """The whole answer. A stream carries it in pieces, one per event, and ends with ``[DONE]``."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageObject | None = None
