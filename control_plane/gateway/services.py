"""Answering a completion request: one Triton request per prompt, side by side, their responses merged into choices."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any

from control_plane.errors import ClientGone, ControlPlaneError, ModelNotReady, NotFound, RequestTimeout, ServingError
from control_plane.gateway.openai_format import Choice, Usage, prompt_logprobs_object, without_tokens
from control_plane.gateway.schemas import CompletionRequest, Prompt
from control_plane.registry.model_directory import folder_of
from control_plane.registry.routing import Route, Router
from control_plane.settings import Settings
from control_plane.traffic.counts import CLIENT_GONE, OK, Observation
from control_plane.traffic.recorder import TrafficRecorder
from control_plane.triton import GenerateCall, TritonClient
from triton_backend.protocol import GenerateResponse
from triton_backend.sampling_params import SamplingParams
from triton_backend.version_folder import MANIFEST_JSON

CHARS_PER_TOKEN = 4
"""How long a token of a text is, roughly, where nobody said; OpenAI's limits count so, too."""


class Completion:
    """One request being answered, by ``whole`` or by ``chunks``. Owned by the thread that serves it.

    ``route`` says which version answers, as soon as there is a first response.
    """

    def __init__(
        self,
        triton: TritonClient,
        router: Router,
        traffic: TrafficRecorder,
        settings: Settings,
        request: CompletionRequest,
        params: SamplingParams,
        is_abandoned: Callable[[], bool],
    ) -> None:
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self.route: Route | None = None
        self._triton = triton
        self._router = router
        self._traffic = traffic
        self._began_at = time.monotonic()
        self._first_token_s: float | None = None
        self._settings = settings
        self._request = request
        self._is_abandoned = is_abandoned
        self._params = params
        self._n = params.n
        self._was_left = False
        self._usage = Usage(len(request.prompt))
        echoed = [prompt.text or "" if request.echo else "" for prompt in request.prompt for _ in range(params.n)]
        self._choices = [Choice(index, text) for index, text in enumerate(echoed)]

    @property
    def charged_tokens(self) -> int:
        """Of its prompts and of everything that was generated for them, estimated where the engine did not say.

        Candidates that are not returned (``best_of``, beams) count as much as those that are. What nobody waited for
        any more counts as OpenAI's limits count a request: its length, and ``max_tokens`` for every candidate.
        """
        return sum(self._charge(index, prompt) for index, prompt in enumerate(self._request.prompt))

    def whole(self) -> dict[str, Any]:
        """The complete answer; raises the first error of any prompt."""
        for _ in self._counted(self._finished_or_new_choices(stream=False)):
            pass
        return self._document([self._choice(choice) for choice in self._choices], self._usage.to_json())

    def chunks(self) -> Generator[dict[str, Any], None, None]:
        """The chunks of a streamed answer; closing it cancels what runs."""
        with closing(self._counted(self._finished_or_new_choices(stream=True))) as choices:
            for choice in choices:
                usage = self._usage.to_json() if self._request.continuous_usage else None
                yield self._document([self._choice(choice)], usage)
        if self._request.include_usage:
            yield self._document([], self._usage.to_json())

    def _finished_or_new_choices(self, stream: bool) -> Generator[Choice, None, None]:
        """Every choice that has something new, once per response."""
        stream = stream and not self._request.is_prompt_only
        for prompt, response in self._responses(stream):
            if self._first_token_s is None:
                self._first_token_s = self._time_to_first_token(response, stream)
            if self._request.is_prompt_only:
                response = without_tokens(response)
            if not self._has_begun(prompt):
                self._begin(prompt, response)
            self._usage.add(prompt, response)
            for output in response.outputs:
                choice = self._choices[prompt * self._n + output.index]
                # Triton's responses carry all n sequences, also those that ended earlier.
                if choice.finish_reason is None and (output.text or output.token_ids or output.finish_reason):
                    choice.add(output)
                    yield choice
            if response.finished:
                yield from self._without_output(prompt, len(response.outputs))

    def _without_output(self, prompt: int, num_found: int) -> Iterator[Choice]:
        """Choices for which there was no text, as when a grammar allows fewer than there are beams; at the end."""
        choices = self._choices_of(prompt)
        # A model process that dies may end its streams as if they were complete.
        if num_found == 0 or any(choice.finish_reason is None for choice in choices[:num_found]):
            raise ServingError(f"model {self._request.model!r} ended an answer in the middle; send the request again")
        for choice in choices[num_found:]:
            choice.finish_reason = "stop"
            yield choice

    def _choices_of(self, prompt: int) -> list[Choice]:
        return self._choices[prompt * self._n : (prompt + 1) * self._n]

    def _has_begun(self, prompt: int) -> bool:
        return self._usage.of_prompt(prompt)[0] > 0

    def _begin(self, prompt: int, response: GenerateResponse) -> None:
        """What the first response to a prompt tells of it."""
        request = self._request
        about: dict[str, Any] = {}
        if request.return_token_ids:
            told = [token.token_id for token in response.prompt_tokens]
            about["prompt_token_ids"] = told or list(request.prompt[prompt].token_ids)
        if request.prompt_logprobs is not None:
            about["prompt_logprobs"] = prompt_logprobs_object(response, request.prompt_logprobs)
        for choice in self._choices_of(prompt):
            choice.about_prompt = about
            if request.echoes_tokens:
                choice.echo(self._echoed_text(prompt, response), response, request.logprobs or 0)

    def _echoed_text(self, prompt: int, response: GenerateResponse) -> str:
        text = self._request.prompt[prompt].text
        if text is None or self._request.is_truncated:
            return "".join(token.text for token in response.prompt_tokens)
        return text

    def _charge(self, index: int, prompt: Prompt) -> int:
        num_candidates = max(self._params.num_sequences, self._usage.num_sequences)
        if self._has_begun(index):
            prompt_tokens, completion_tokens = self._usage.of_prompt(index)
            return prompt_tokens + -(-completion_tokens * num_candidates // self._n)
        if not self._was_left:
            return 0
        length = len(prompt.token_ids) if prompt.text is None else len(prompt.text) // CHARS_PER_TOKEN + 1
        return length + num_candidates * self._params.max_tokens

    def _counted(self, choices: Generator[Choice, None, None]) -> Generator[Choice, None, None]:
        """The choices; how they ended is told to the traffic recorder."""
        outcome = "internal_error"
        try:
            with closing(choices):
                yield from choices
            outcome = OK
        except ControlPlaneError as error:
            outcome = error.code
            self._was_left = isinstance(error, (ClientGone, RequestTimeout))
            raise
        except GeneratorExit:
            outcome, self._was_left = CLIENT_GONE, True
            raise
        finally:
            # Clients may go after the last token, without waiting for [DONE].
            is_complete = all(choice.finish_reason for choice in self._choices)
            self._record(OK if outcome == CLIENT_GONE and is_complete else outcome)

    def _time_to_first_token(self, response: GenerateResponse, stream: bool) -> float | None:
        if any(output.token_ids for output in response.outputs) and stream:
            return time.monotonic() - self._began_at
        # A whole answer comes at the end; the engine says when its first token was there.
        engine = response.metrics
        return float(engine["queue_s"] + engine["prefill_s"]) if {"queue_s", "prefill_s"} <= engine.keys() else None

    def _record(self, outcome: str) -> None:
        # Without a route there was no version that could have done anything.
        if self.route is not None:
            tokens = self._usage.to_json()
            seen = Observation(
                self.route.name,
                self.route.version,
                outcome,
                tokens["prompt_tokens"],
                tokens["completion_tokens"],
                self._first_token_s,
                time.monotonic() - self._began_at,
            )
            self._traffic.record(seen)

    def _responses(self, stream: bool) -> Iterator[tuple[int, GenerateResponse]]:
        """Responses by the position of their prompt. A version that was unloaded just now is looked for once more."""
        name, affinity = self._request.model, self._request.user
        self.route = self._router.route(name, affinity)
        has_begun = False
        try:
            for item in self._responses_of(self.route, stream):
                has_begun = True
                yield item
        except (NotFound, ModelNotReady):
            if has_begun:
                raise
            self.route = self._router.route(name, affinity, max_age_s=0)
            try:
                yield from self._responses_of(self.route, stream)
            except NotFound as error:
                # The model does exist; it is Triton that does not have it at this moment.
                raise ModelNotReady(f"model {name!r} is being loaded again ({error}); try again") from None

    def _responses_of(self, route: Route, stream: bool) -> Iterator[tuple[int, GenerateResponse]]:
        calls = [
            GenerateCall(
                *route.place,
                text=prompt.text,
                input_ids=prompt.token_ids,
                sampling=self._request.sampling,
                stream=stream,
                return_logprobs=self._request.logprobs is not None,
                request_id=f"{self.id}-{index}",
            )
            for index, prompt in enumerate(self._request.prompt)
        ]
        timeout_s = self._settings.request_timeout_s
        with closing(self._triton.generate_many(calls, timeout_s, self._is_abandoned)) as responses:
            yield from responses

    def _choice(self, choice: Choice) -> dict[str, Any]:
        document = choice.take(with_logprobs=self._request.logprobs is not None)
        if not self._request.return_token_ids:
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


def served_models(router: Router, settings: Settings) -> list[dict[str, Any]]:
    """OpenAI's model objects of everything whose production version is loaded."""
    return [_model_object(route, settings) for route in router.served()]


def served_model(router: Router, settings: Settings, name: str) -> dict[str, Any]:
    """Raises NotFound or ModelNotReady."""
    return {**_model_object(router.route(name), settings), "id": name}


def _model_object(route: Route, settings: Settings) -> dict[str, Any]:
    manifest = folder_of(settings.model_repository, route.place) / MANIFEST_JSON
    created = int(manifest.stat().st_mtime) if manifest.is_file() else 0
    return {
        "id": route.name,
        "object": "model",
        "created": created,
        "owned_by": "llmos",
        "root": f"{route.name}@{route.version}",
        "parent": None,
    }
