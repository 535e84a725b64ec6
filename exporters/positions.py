"""Positions for models that are not told them, as tables that are looked up with explicit positions.

Encoder–decoders and some decoders work their positions out for themselves, from the length of the cache; a graph that
holds rows of different lengths must be told. What a module says about positions is asked once, before tracing, and kept
as a table:

    a module that is told ``past_key_values_length``   →  embedding of every position    (P, E)
    a module with ``compute_bias``                     →  bias of every distance          (H, distances)

Learned and sinusoidal embeddings, offsets and logarithmic buckets all become the same lookup. Only what these modules
answer is used, nothing is known about how they work.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from exporters.errors import UnsupportedArchitecture, reason_of

TABLE = "position_table"
"""Name of the buffer that a module has while its table is in use."""


class Positions:
    """Where the tokens are that run through the model; filled by whoever calls it.

    query  int64 (B, S) or (1, S): position of each new token
    key    int64 (T): positions of the keys that relative biases are asked for
    """

    def __init__(self) -> None:
        self.query: torch.Tensor | None = None
        self.key: torch.Tensor | None = None


def embeds_positions(stack: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules of an encoder or decoder that embed absolute positions."""
    return [
        module
        for module in stack.modules()
        if not list(module.children()) and "past_key_values_length" in inspect.signature(module.forward).parameters
    ]


def biases_positions(stack: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules of an encoder or decoder that bias scores by distance."""
    return [
        module
        for module in stack.modules()
        if hasattr(module, "compute_bias")
        and isinstance(getattr(module, "relative_attention_bias", None), torch.nn.Module)
    ]


class ToldPositions:
    """Hands positions (B, S) to a decoder: as its ``position_ids``, or through tables if it takes none."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._tables: Positions | None = None
        self._is_argument = "position_ids" in inspect.signature(model.forward).parameters

    def arguments(self, position_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What to call the model with for its tokens to be at ``position_ids``."""
        if self._tables is not None:
            self._tables.query = position_ids
        return {"position_ids": position_ids} if self._is_argument else {}

    @contextmanager
    def handed_over(self) -> Iterator[None]:
        """While open, the model looks at what it is told; raises UnsupportedArchitecture if it cannot."""
        if self._is_argument:
            yield
            return
        if not embeds_positions(self._model):
            raise UnsupportedArchitecture(
                f"{type(self._model).__name__} takes no position_ids and has no embedding of positions (it is "
                "recurrent, or knows order by its own means); expected a model that can be told its positions"
            )
        config: Any = self._model.config.get_text_config(decoder=True)
        num_positions = getattr(config, "max_position_embeddings", None) or config.max_target_positions
        with explicit_positions(self._model, int(num_positions)) as self._tables:
            yield
        self._tables = None


@contextmanager
def explicit_positions(stack: torch.nn.Module, num_positions: int) -> Iterator[Positions]:
    """While open, ``stack``, an encoder or a decoder, takes its positions from what is yielded.

    Tables hold ``num_positions`` positions; raises UnsupportedArchitecture if the model has fewer.
    """
    positions = Positions()
    changed: list[tuple[torch.nn.Module, str]] = []
    try:
        for module in embeds_positions(stack):
            module.register_buffer(TABLE, _embeddings(stack, module, num_positions), persistent=False)
            changed.append((module, "forward"))
            module.forward = _lookup(module, positions)
        for module in biases_positions(stack):
            module.register_buffer(TABLE, _biases(module, num_positions), persistent=False)
            changed.append((module, "compute_bias"))
            module.compute_bias = _bias(module, positions, num_positions)  # type: ignore[assignment]
        yield positions
    finally:
        for module, replaced in changed:
            delattr(module, replaced)  # the instance's; the class's shows again
            delattr(module, TABLE)


class _Answered(Exception):
    """Ends a dry run that has seen what it was made for."""


def _embeddings(stack: torch.nn.Module, module: torch.nn.Module, num_positions: int) -> torch.Tensor:
    """(P, E): what ``module`` answers when ``stack`` is given P tokens."""
    embed: Callable[..., torch.Tensor] = module.forward
    answers: list[torch.Tensor] = []

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        answers.append(embed(*args, **kwargs))
        raise _Answered

    config: Any = stack.config
    # Some modules count no padding; and position 0 must not be mistaken for the first of the sources' tokens.
    token = 1 if config.pad_token_id == 0 else 0
    tokens = torch.full((1, num_positions), token, dtype=torch.int64)
    module.forward = forward
    try:
        with torch.no_grad():
            stack(input_ids=tokens, use_cache=False) if _takes_cache(stack) else stack(input_ids=tokens)
    except _Answered:
        pass
    except (IndexError, RuntimeError) as error:
        raise UnsupportedArchitecture(
            f"{type(stack).__name__} cannot embed {num_positions} positions ({reason_of(error)}); "
            "ask for a smaller max_model_len or max_source_len"
        ) from error
    finally:
        del module.forward
    table = answers[0].reshape(num_positions, -1) if answers else None
    if table is None:
        raise UnsupportedArchitecture(f"{type(stack).__name__} does not call its {type(module).__name__}")
    return table.detach().clone()


def _takes_cache(stack: torch.nn.Module) -> bool:
    return "use_cache" in inspect.signature(stack.forward).parameters


def _lookup(module: torch.nn.Module, positions: Positions) -> Callable[..., torch.Tensor]:
    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        assert positions.query is not None
        table: torch.Tensor = getattr(module, TABLE)
        return torch.nn.functional.embedding(positions.query, table)

    return forward


def _biases(module: Any, num_positions: int) -> torch.Tensor:
    """(H, 2P − 1): bias of a key that is P − 1 − j tokens before the query, for j = 0 … 2P − 2."""
    with torch.no_grad():
        before = module.compute_bias(1, num_positions, past_seen_tokens=num_positions - 1)[0, :, 0]
        after = module.compute_bias(1, num_positions, past_seen_tokens=0)[0, :, 0, 1:]
        table = torch.cat((before, after), dim=-1).contiguous()
        # Is it the distance alone that counts?
        middle = num_positions // 2
        asked = module.compute_bias(1, num_positions, past_seen_tokens=middle)[0, :, 0]
    start = num_positions - 1 - middle
    if not torch.equal(asked, table[:, start : start + num_positions]):
        raise UnsupportedArchitecture(
            f"{type(module).__name__} biases its scores by more than the distance between query and key; "
            "expected a relative position bias"
        )
    return table


def _bias(module: torch.nn.Module, positions: Positions, num_positions: int) -> Callable[..., torch.Tensor]:
    def compute_bias(*args: Any, **kwargs: Any) -> torch.Tensor:
        """(B, H, S, T), as the operator takes it."""
        assert positions.query is not None and positions.key is not None
        table: torch.Tensor = getattr(module, TABLE)
        offset = positions.key[None, None] - positions.query[:, :, None] + (num_positions - 1)
        bias = torch.onnx.ops.symbolic(
            "Gather", (table, offset), {"axis": 1}, dtype=table.dtype, shape=(table.shape[0], *offset.shape)
        )
        return bias.transpose(0, 1)

    return compute_bias
