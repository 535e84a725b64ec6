"""Structured output: compiles a grammar and masks the tokens that would leave it. All parsing is llguidance's.

``GrammarCompiler.compile`` runs on the thread that submits a request and is bounded by ``LIMITS``; a grammar that is
wrong, too complex or matches nothing is refused there. A ``GrammarState`` follows one sequence on the engine thread;
when its own limits stop it, ``error`` says why, and only its request ends.

https://github.com/guidance-ai/llguidance
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark

from triton_backend.config import ModelConfig
from triton_backend.errors import InvalidRequest
from triton_backend.grammar_params import GrammarSpec
from triton_backend.tokenizer import Tokenizer

MAX_COMPILED = 64
# llguidance recurses once per reference: 2000 of them overflow 8 MiB and end the process, and the longest grammar that
# is let in holds 16,000, for which 64 MiB are enough. Only what is touched is memory.
STACK_BYTES = 256 << 20
# The library's converter takes time by the square of a chain of rules: 0.7 s for 1000, 7 s for 4000.
MAX_GBNF_RULES = 1000
# About 20 ms for the lexer of a grammar and 15 ms for one mask; a step waits for the slowest.
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_items_in_row=2000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
# Free whitespace lets a weak model write nothing else for ever.
JSON_OPTIONS: Any = {"whitespace_pattern": r"[ \t\r\n]{0,24}"}


class GrammarState:
    """Where one sequence is in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self.error: str | None = None

    @property
    def is_finished(self) -> bool:
        """Nothing but an end token may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def copy(self) -> GrammarState:
        return GrammarState(self._matcher.deep_copy())

    def accept(self, token_id: int) -> None:
        if not self._matcher.is_stopped() and not self._matcher.consume_token(token_id):
            self._fail()

    def allowed(self, vocab_size: int) -> np.ndarray | None:
        """bool (V): which tokens may come next; None if that cannot be told, and then ``error`` says why."""
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            self._fail()
            return None
        bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")[:vocab_size]
        return np.pad(bits, (0, vocab_size - len(bits))).astype(bool)

    def mask(self, logits: torch.Tensor) -> None:
        """Set to −inf in ``logits`` (V), in place, what may not come next; nothing if that cannot be told."""
        allowed = self.allowed(len(logits))
        if allowed is not None:
            logits.masked_fill_(torch.from_numpy(~allowed).to(logits.device), float("-inf"))

    def _fail(self) -> None:
        self.error = f"the output's grammar cannot be followed any further: {_reason(self._matcher)}; make it simpler"


class GrammarCompiler:
    """Compiles grammars for one tokenizer and keeps the latest; safe to use from any thread."""

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._lock = threading.Lock()
        self._ll_tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[GrammarSpec, LLMatcher] = OrderedDict()

    def has(self, spec: GrammarSpec) -> bool:
        """Whether it is compiled already."""
        return spec in self._compiled

    def compile(self, spec: GrammarSpec) -> GrammarState:
        """The beginning of a grammar; raises InvalidRequest that says what is wrong with it."""
        with self._lock:
            matcher = self._compiled.get(spec)
        # Others need not wait for a hard one.
        matcher = matcher or self._new_matcher(spec)
        with self._lock:
            self._compiled[spec] = matcher
            self._compiled.move_to_end(spec)
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
            return GrammarState(matcher.deep_copy())

    def _new_matcher(self, spec: GrammarSpec) -> LLMatcher:
        return on_deep_stack(lambda: self._build(spec))

    def _build(self, spec: GrammarSpec) -> LLMatcher:
        try:
            grammar = GRAMMARS[spec.kind](spec.text)
        except Exception as error:  # the library's converters raise whatever they meet
            raise InvalidRequest(f"the {spec.kind} grammar is not valid: {error}; correct it") from None
        matcher = LLMatcher(self._tokens(), grammar, log_level=0, limits=LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()  # finds out what matches nothing, or costs too much at once
        if matcher.is_error() or (matcher.is_stopped() and not matcher.is_accepting()):
            raise InvalidRequest(f"the {spec.kind} grammar cannot be used: {_reason(matcher)}; correct or simplify it")
        return matcher

    def _tokens(self) -> LLTokenizer:
        with self._lock:
            if self._ll_tokenizer is None:
                self._ll_tokenizer = self._new_tokenizer()
            return self._ll_tokenizer

    def _new_tokenizer(self) -> LLTokenizer:
        config = self._config
        num_tokens = max(config.vocab_size, self._tokenizer.vocab_size)
        try:
            return LLTokenizer(
                self._tokenizer.to_json(), n_vocab=num_tokens, eos_token=list(config.eos_token_ids) or None
            )
        except Exception as error:  # the library raises plain exceptions
            raise InvalidRequest(
                f"this model's tokenizer cannot be used for structured output ({error}); leave the grammar out"
            ) from None


def on_deep_stack(build: Callable[[], LLMatcher]) -> LLMatcher:
    """What ``build`` returns or raises, from a thread with ``STACK_BYTES`` of stack."""
    with _stack_size_lock:
        usual = threading.stack_size(STACK_BYTES)
        try:
            pool = ThreadPoolExecutor(1, "grammar")
            result = pool.submit(build)
        finally:
            threading.stack_size(usual)
    with pool:
        return result.result()


_stack_size_lock = threading.Lock()  # the size is the process's, for threads that start next


def _choice(text: str) -> str:
    items = (json.dumps(item, ensure_ascii=False).replace("\x7f", "\\u007f") for item in json.loads(text))
    return LLMatcher.grammar_from_lark("start: " + " | ".join(items))


def _json_schema(text: str) -> str:
    return LLMatcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS)


def _gbnf(text: str) -> str:
    if (num_rules := text.count("::=")) > MAX_GBNF_RULES:
        raise ValueError(f"it has {num_rules} rules; expected at most {MAX_GBNF_RULES}")
    return LLMatcher.grammar_from_lark(gbnf_to_lark(text))


GRAMMARS: dict[str, Callable[[str], str]] = {
    "json_schema": _json_schema,
    "json_object": lambda text: _json_schema('{"type": "object"}'),
    "regex": LLMatcher.grammar_from_regex,
    "choice": _choice,
    "lark": LLMatcher.grammar_from_lark,
    "gbnf": _gbnf,
}


def _reason(matcher: LLMatcher) -> str:
    """The library's words on one line."""
    words = " ".join(matcher.get_error().split()) or f"it matches nothing ({matcher.stop_reason()})"
    return words if len(words) <= 300 else words[:300] + "…"
