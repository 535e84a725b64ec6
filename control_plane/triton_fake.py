"""A Triton without Triton, for tests that take milliseconds: the interface of ``TritonClient``, scripted answers.

``FakeTriton({"starter": word_by_word})``: a script turns a call into the responses it gets, and may raise any
ControlPlaneError at any point. It says whether a request was closed before its end, as the engine would see it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

from control_plane.errors import BadRequest, ClientGone, ControlPlaneError, ModelNotReady, NotFound, TritonUnavailable
from control_plane.triton import TritonClient
from control_plane.triton_wire import GenerateCall, IndexEntry, ProbeResult
from triton_backend.errors import InvalidRequest
from triton_backend.protocol import GenerateResponse, PromptToken, SequenceOutput, TokenLogprob
from triton_backend.sampling_params import SamplingParams

Script = Callable[[GenerateCall], Iterable[GenerateResponse]]


class FakeTriton(TritonClient):
    """``models`` maps a model's name to its script, ``versions`` to those that are loaded: version 1 if not said.

    Set ``is_running`` or ``probe_error`` to break things, ``digests`` to what probes find, ``generation_defaults`` to
    the models' own sampling parameters. What contradicts itself is refused, as the engine does it.
    """

    def __init__(self, models: Mapping[str, Script], versions: Mapping[str, Sequence[int]] | None = None) -> None:
        super().__init__("fake")
        self.models = dict(models)
        self.versions = {name: list(numbers) for name, numbers in (versions or {}).items()}
        self.digests: dict[tuple[str, int | None], str] = {}
        self.generation_defaults: Mapping[str, Any] = {}
        self.is_running = True
        self.probe_error: ControlPlaneError | None = None
        self.calls: list[GenerateCall] = []
        self.num_probes = 0
        self.num_cancelled = 0

    def is_live(self) -> bool:
        return self.is_running

    def server_version(self) -> str:
        self._require_running()
        return "fake"

    def repository_index(self) -> list[IndexEntry]:
        self._require_running()
        return [
            IndexEntry(name, str(version), "READY", "")
            for name in self.models
            for version in self.versions.get(name, [1])
        ]

    def load(self, name: str, timeout_s: float = 1.0) -> None:
        self._require_running()
        self.models.setdefault(name, word_by_word)

    def unload(self, name: str, timeout_s: float = 1.0) -> None:
        self._require_running()
        self.models.pop(name, None)

    def probe(self, model: str, version: int | None = None, timeout_s: float | None = None) -> ProbeResult:
        self._require_running()
        self._script(model, version)
        self.num_probes += 1
        if self.probe_error is not None:
            raise self.probe_error
        return ProbeResult(latency_s=0.002, engine_uptime_s=60.0, digest=self.digests.get((model, version), "fake"))

    def generate_many(
        self, calls: Sequence[GenerateCall], timeout_s: float, is_abandoned: Callable[[], bool] | None = None
    ) -> Generator[tuple[int, GenerateResponse], None, None]:
        self._require_running()
        for call in calls:
            self._require_consistent(call)
        self.calls += calls
        is_finished = False
        try:
            for position, call in enumerate(calls):
                for response in self._script(call.model, call.version)(call):
                    if is_abandoned is not None and is_abandoned():
                        raise ClientGone("the client hung up before its answer was complete")
                    yield position, response
            is_finished = True
        finally:
            self.num_cancelled += not is_finished

    def close(self) -> None:
        self.is_running = False

    def _require_running(self) -> None:
        if not self.is_running:
            raise TritonUnavailable("Triton at fake does not answer")

    def _require_consistent(self, call: GenerateCall) -> None:
        try:
            SamplingParams.from_mapping(call.sampling, self.generation_defaults)
        except InvalidRequest as error:
            raise BadRequest(error.args[0]) from None

    def _script(self, model: str, version: int | None) -> Script:
        if model not in self.models:
            raise NotFound(f"Request for unknown model: '{model}' is not found")
        if version is not None and version not in self.versions.get(model, [1]):
            raise ModelNotReady(f"Request for unknown model: '{model}' version {version} is not at ready state")
        return self.models[model]


def word_by_word(call: GenerateCall, pause_s: float = 0.0) -> Iterable[GenerateResponse]:
    """Answer "w0 w1 …" with one token per word, in the manner of the engine: deltas, or everything at once."""
    num_tokens, num_sequences = call.sampling.get("max_tokens", 16), call.sampling.get("n", 1)
    num_candidates = call.sampling.get("best_of") or call.sampling.get("beam_width") or num_sequences
    num_input_tokens = len(call.input_ids) if call.text is None else len(call.text.split())
    step = 1 if call.stream else num_tokens
    for start in range(0, num_tokens, step):
        time.sleep(pause_s)
        finished = start + step >= num_tokens
        tokens = range(start, start + step)
        output = SequenceOutput(
            index=0,
            text="".join(f"w{i} " for i in tokens),
            token_ids=tuple(tokens),
            finish_reason="length" if finished else None,
            logprobs=tuple(_alternatives(i) for i in tokens) if call.return_logprobs else (),
        )
        outputs = tuple(_with_index(output, index) for index in range(num_sequences))
        metrics = (
            {"num_sequences": num_candidates, "cached_tokens": 0, "engine_uptime_s": 60.0, "digest": "fake"}
            if finished
            else {}
        )
        prompt = _prompt(call) if start == 0 else {}
        yield GenerateResponse(call.request_id, outputs, num_input_tokens, finished, metrics, **prompt)


def _with_index(output: SequenceOutput, index: int) -> SequenceOutput:
    return SequenceOutput(
        index=index,
        text=output.text,
        token_ids=output.token_ids,
        finish_reason=output.finish_reason,
        logprobs=output.logprobs,
    )


def _prompt(call: GenerateCall) -> dict[str, Any]:
    """Words of a text, each with the space before it, or "t5 " for token 5; "🙂" is two tokens, as halves of it are."""
    texts = [f"t{i} " for i in call.input_ids] if call.text is None else re.findall(r"\s*\S+", call.text)
    halves = [half for text in texts for half in (("", text) if text.strip() == "🙂" else (text,))]
    tokens = tuple(PromptToken(i, text or "\ufffd", text) for i, text in enumerate(halves))
    if "prompt_logprobs" not in call.sampling:
        return {"prompt_tokens": tokens} if call.sampling.get("return_prompt_tokens") else {}
    others = [TokenLogprob(1000 + rank, -rank, rank, f"other{rank}") for rank in (1, 2, 3)]
    num_best = call.sampling["prompt_logprobs"]
    logprobs = [(TokenLogprob(t.token_id, -0.25, 4, t.decoded_token), *others[:num_best]) for t in tokens]
    return {"prompt_tokens": tokens, "prompt_logprobs": (None, *logprobs[1:])}


def _alternatives(token_id: int) -> tuple[TokenLogprob, ...]:
    offset = sum(len(f"w{i} ") for i in range(token_id))
    return (TokenLogprob(token_id, -0.5, 1, f"w{token_id} ", offset), TokenLogprob(99, -1.5, 2, "other"))
