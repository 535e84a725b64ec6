"""transformers' own continuous batching: its manager thread, its paged cache, attention through PyTorch's kernels.

It records when each token was known. Left to itself on a CPU it would reserve most of the memory for its cache; it gets
room for what runs at once, and prompts are cut so that a step has at most as many tokens as one of llmos.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.engines import Limits, Unavailable
from benchmarks.engines.closed_loop import ClosedLoop, Serve
from benchmarks.engines.torch_sdpa import endless_model, prepare

__all__ = ["SERVED_BY", "prepare", "serve"]

SERVED_BY = "continuous batching manager"
MAX_BATCH_TOKENS = 512
PAGE_TOKENS = 256
NO_TOKEN = -1


def serve(checkpoint: Path, folder: Path, precision: str, limits: Limits) -> Serve:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = endless_model("sdpa", checkpoint, limits)
    generation = GenerationConfig(do_sample=False, eos_token_id=NO_TOKEN, pad_token_id=0)
    num_pages = 1 + limits.max_rows * -(-limits.max_tokens // PAGE_TOKENS)
    batching = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS, num_blocks=num_pages, max_batch_tokens=MAX_BATCH_TOKENS, auto_switch_to_flash=False
    )

    def serve_clients(loop: ClosedLoop) -> None:
        with model.continuous_batching_context_manager(generation, continuous_batching_config=batching) as manager:
            while not loop.is_done:
                _send(manager, loop)
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise Unavailable(f"its manager ended: {manager.background_thread_status.fatal_error!r}")
                if result is not None and result.error:
                    raise Unavailable(f"its manager refused a request: {result.error}")
                if result is not None and result.is_finished():
                    for token, time_s in zip(result.generated_tokens, result.timestamps, strict=True):
                        loop.token(int(result.request_id), token, time_s)

    return serve_clients


def _send(manager: Any, loop: ClosedLoop) -> None:
    for arrival in loop.arrivals():
        manager.add_request(
            list(arrival.prompt),
            request_id=str(arrival.index),
            max_new_tokens=loop.num_new,
            record_timestamps=True,
            eos_token_id=NO_TOKEN,
        )
