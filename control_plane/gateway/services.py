"""Answering a completion request: one Triton request per prompt, side by side, their responses merged into choices."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any

from control_plane.errors import ControlPlaneError, ModelNotReady, NotFound
from control_plane.gateway.openai_format import Choice, Usage
from control_plane.gateway.schemas import CompletionRequest
from control_plane.registry.model_directory import InstalledModel, installed_models
from control_plane.settings import Settings
from control_plane.triton import GenerateCall, TritonClient
from triton_backend.protocol import GenerateResponse
from triton_backend.sampling_params import SamplingParams


class Completion:
    """One request being answered, by ``whole`` or by ``chunks``. Owned by the thread that serves it."""

    def __init__(
        self,
        triton: TritonClient,
        settings: Settings,
        request: CompletionRequest,
        params: SamplingParams,
        is_abandoned: Callable[[], bool],
    ) -> None:
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._triton = triton
        self._settings = settings
        self._request = request
        self._is_abandoned = is_abandoned
        self._n = params.n
        self._usage = Usage(len(request.prompt))
        echoed = [prompt.text or "" for prompt in request.prompt for _ in range(params.n)] if request.echo else None
        self._choices = [
            Choice(index, text=echoed[index] if echoed else "") for index in range(len(request.prompt) * params.n)
        ]

    @property
    def total_tokens(self) -> int:
        """Of its prompts and of what was generated so far."""
        return self._usage.total_tokens

    def whole(self) -> dict[str, Any]:
        """The complete answer; raises the first error of any prompt."""
        for _ in self._finished_or_new_choices(stream=False):
            pass
        return self._document([self._choice(choice) for choice in self._choices], self._usage.to_json())

    def chunks(self) -> Generator[dict[str, Any], None, None]:
        """The chunks of a streamed answer; closing it cancels what runs."""
        with closing(self._finished_or_new_choices(stream=True)) as choices:
            for choice in choices:
                usage = self._usage.to_json() if self._request.continuous_usage else None
                yield self._document([self._choice(choice)], usage)
        if self._request.include_usage:
            yield self._document([], self._usage.to_json())

    def _finished_or_new_choices(self, stream: bool) -> Generator[Choice, None, None]:
        """Every choice that has something new, once per response."""
        for prompt, response in self._responses(stream):
            self._usage.add(prompt, response)
            for output in response.outputs:
                choice = self._choices[prompt * self._n + output.index]
                # Triton's responses carry all n sequences, also those that ended earlier.
                if choice.finish_reason is None and (output.text or output.token_ids or output.finish_reason):
                    choice.add(output)
                    yield choice

    def _responses(self, stream: bool) -> Iterator[tuple[int, GenerateResponse]]:
        calls = [
            GenerateCall(
                model=self._request.model,
                text=prompt.text,
                input_ids=prompt.token_ids,
                sampling=self._request.sampling,
                stream=stream,
                return_logprobs=self._request.logprobs is not None,
                request_id=f"{self.id}-{index}",
            )
            for index, prompt in enumerate(self._request.prompt)
        ]
        try:
            with closing(
                self._triton.generate_many(calls, self._settings.request_timeout_s, self._is_abandoned)
            ) as responses:
                yield from responses
        except NotFound:
            raise missing_model(self._triton, self._settings, self._request.model) from None

    def _choice(self, choice: Choice) -> dict[str, Any]:
        document = choice.take()
        if self._request.return_token_ids:
            ids = self._request.prompt[choice.index // self._n].token_ids
            document["prompt_token_ids"] = list(ids) or None
        else:
            del document["token_ids"]
        return document

    def _document(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        document: dict[str, Any] = {
            "id": self.id,
            "object": "text_completion",
            "created": self._created,
            "model": self._request.model,
            "choices": choices,
        }
        if usage is not None or self._request.include_usage:
            document["usage"] = usage
        return document


def served_models(triton: TritonClient, settings: Settings) -> list[dict[str, Any]]:
    """OpenAI's model objects of everything that Triton has ready."""
    ready = {entry.name for entry in triton.repository_index() if entry.is_ready}
    installed = {model.name: model for model in installed_models(settings.model_repository)}
    return [_model_object(name, installed.get(name)) for name in sorted(ready)]


def served_model(triton: TritonClient, settings: Settings, name: str) -> dict[str, Any]:
    for model in served_models(triton, settings):
        if model["id"] == name:
            return model
    raise missing_model(triton, settings, name)


def missing_model(triton: TritonClient, settings: Settings, name: str) -> ControlPlaneError:
    """Why Triton does not serve ``name``: not installed at all, or installed and not ready, with Triton's reason."""
    if name not in {model.name for model in installed_models(settings.model_repository)}:
        return NotFound(f"model {name!r:.200} does not exist; GET /v1/models lists those that do")
    reasons = [entry.reason or entry.state for entry in triton.repository_index() if entry.name == name]
    reason = next((reason for reason in reasons if reason), "it is not loaded yet")
    return ModelNotReady(f"model {name!r} is installed but not ready: {reason}")


def _model_object(name: str, model: InstalledModel | None) -> dict[str, Any]:
    created = int((model.folder / "manifest.json").stat().st_mtime) if _is_sealed(model) and model else 0
    return {"id": name, "object": "model", "created": created, "owned_by": "llmos", "root": name, "parent": None}


def _is_sealed(model: InstalledModel | None) -> bool:
    return model is not None and (model.folder / "manifest.json").is_file()
