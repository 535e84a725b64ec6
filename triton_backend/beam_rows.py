"""Carries out a beam search in the cache: which row every beam lives in, and what is copied when beams branch.

A request's sequences are its rows. The best child of a beam stays in its parent's row; the others move into rows of
beams that died, and only what differs there is copied, since beams that branched late share most of their past.
No tensors: what is to be copied is returned. Owned by the engine thread.

    beams  A  B  C      extensions  A·x  A·y  C·z      row of A: A·x    row of B: A·y, copied    row of C: C·z
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items

from triton_backend.beam_search import Candidate, Hypothesis
from triton_backend.cache_manager import RowCopy, common_prefix_length
from triton_backend.sequence import FinishReason, RequestState, SampledToken, Sequence

Fork = Callable[[Sequence, Sequence], None]


def advance(
    state: RequestState, candidates: Items[Items[Candidate]], ends: Callable[[int, int], bool], on_fork: Fork
) -> list[RowCopy]:
    """Extend the beams of ``state`` by one token; returns the copies to make before they are computed.

    ``on_fork(parent, child)`` is told of every sequence that becomes a copy of another one.
    """
    assert state.search is not None
    extensions = state.search.advance(candidates, ends)
    if state.search.is_finished:
        state.beams = []
        state.hypotheses = tuple(
            _finished(state, index, found) for index, found in enumerate(state.search.best(state.params.n))
        )
        return []
    copies: list[RowCopy] = []
    parents, state.beams = state.beams, []
    spare = [s for s in state.sequences if s not in {parents[extension.parent] for extension in extensions}]
    kept: set[int] = set()
    for extension in extensions:
        parent = parents[extension.parent]
        if extension.parent in kept:
            child = max(spare, key=lambda sequence: _shared(parent, sequence))
            spare.remove(child)
            copies.append(RowCopy(parent.row, child.row, _shared(parent, child), parent.num_computed))
            child.become(parent)
            on_fork(parent, child)
        else:
            child = parent
            kept.add(extension.parent)
        state.beams.append(child)
    for child, extension in zip(state.beams, extensions, strict=True):
        child.append(SampledToken(extension.token_id, is_forced=extension.is_forced))
    return copies


def _shared(parent: Sequence, child: Sequence) -> int:
    """How many positions of the child's row already hold what the parent's row holds."""
    limit = min(parent.num_computed, child.num_computed)
    num_prompt = parent.num_prompt_tokens
    if limit <= num_prompt:
        return limit
    return num_prompt + common_prefix_length(parent.output_ids, child.output_ids, limit - num_prompt)


def _finished(state: RequestState, index: int, hypothesis: Hypothesis) -> Sequence:
    """A hypothesis as a sequence that has ended."""
    sequence = Sequence(index, state.lead.prompt_ids, state.params)
    sequence.state = state
    sequence.output_ids = list(hypothesis.token_ids)
    sequence.logprobs = list(hypothesis.logprobs)
    sequence.cumulative_logprob = hypothesis.cumulative_logprob
    sequence.score = hypothesis.score
    sequence.is_at_end_token = hypothesis.is_at_end_token
    sequence.finish_reason = FinishReason(hypothesis.finish_reason)
    return sequence
