"""Speculation: tokens drafted from the text so far, verified by the model in one run over one row.

Only for a greedy sequence that runs alone: with several rows a decode step is used well already, and a row is verified
in a run of its own. Verified positions take the attention's prefill path, whose last bits differ from the decode
path's; a choice that such a difference could turn is left to the decode path. The keys and values of what was accepted
keep their last bits, which is why drafts need ``deterministic`` false: a later choice between two tokens that are
equal but for such bits may be the other one.
Owned by the engine thread.
"""

from __future__ import annotations

from triton_backend.config import VersionConfig
from triton_backend.model_runner import ModelRunner
from triton_backend.prompt_lookup import draft
from triton_backend.sequence import RequestState, Sequence

MARGINS = {"fp32": 1e-3, "fp16": 0.1, "bf16": 0.5, "int8": 0.5, "int4": 1.0}
"""How far the best logit must be ahead: well over what the two paths were seen to differ by, per precision."""
MIN_ACCEPTANCE = 0.2
NUM_TRIAL_TOKENS = 32


class Speculator:
    """Chooses the next tokens of a sequence, when it can choose more than one."""

    def __init__(self, config: VersionConfig, runner: ModelRunner) -> None:
        self._num_tokens = config.engine.num_speculative_tokens
        if config.engine.max_source_len:  # no run of an encoder–decoder takes more tokens
            self._num_tokens = min(self._num_tokens, config.engine.max_source_len - 2)
        self._has_forced_end = config.model.forced_eos_token_id is not None
        self._max_model_len = config.engine.max_model_len
        self._margin = MARGINS[config.model.precision]
        self._runner = runner

    def propose(self, sequence: Sequence) -> list[int]:
        """The sequence's next tokens, each the model's own choice after those before it; empty if none is certain."""
        drafted = self._draft(sequence)
        if not drafted:
            return []
        start = sequence.num_tokens - 1
        top_logits, top_ids = self._runner.verify(sequence.row, [sequence.output_ids[-1], *drafted], start)
        is_certain = (top_logits[:, 0] - top_logits[:, 1] >= self._margin).tolist()
        chosen: list[int] = []
        for token_id, drafted_id, certain in zip(top_ids[:, 0].tolist(), [*drafted, None], is_certain, strict=True):
            if not certain:
                break
            chosen.append(token_id)
            if token_id != drafted_id:
                break
        sequence.state.num_draft_tokens += len(drafted)
        sequence.state.num_accepted_tokens += max(0, len(chosen) - 1)
        return chosen

    def _draft(self, sequence: Sequence) -> list[int]:
        if not self._pays(sequence.state):
            return []
        # One less than fits: the run may need a token behind the last one (model_runner.QUERY_BLOCK).
        room = self._max_model_len - sequence.num_tokens - 1
        if self._has_forced_end:  # the last token is not the model's to choose
            room = min(room, sequence.params.max_tokens - len(sequence.output_ids) - 2)
        if room <= 0:
            return []
        return draft((*sequence.prompt_ids, *sequence.output_ids), min(self._num_tokens, room))

    def _pays(self, state: RequestState) -> bool:
        """Not once many drafts of this request were wrong."""
        num_drafted = state.num_draft_tokens
        return num_drafted < NUM_TRIAL_TOKENS or state.num_accepted_tokens >= MIN_ACCEPTANCE * num_drafted
