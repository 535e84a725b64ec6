"""Asking the engine about every item of a stream: some requests at once, never more than it can run.

Answers come in the order in which they are ready, which is another one in every run; whoever adds them up must not
depend on it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from exporters.engine_process import EngineAnswer, EngineProcess
from exporters.errors import InvalidData, RequestRefused
from triton_backend.config import VersionConfig


class Item(Protocol):
    """Anything that can be asked about. ``place`` is where it stands in the data."""

    @property
    def place(self) -> str: ...

    def request(self) -> dict[str, Any]:
        """A request as ``python -m triton_backend`` reads it, without its id."""


@dataclass(frozen=True)
class Answered:
    item: Any
    answer: EngineAnswer


def answers(folder: Path, version: VersionConfig, items: Iterable[Item]) -> Generator[Answered, None, None]:
    """Every item with its answer; closing it ends the engine.

    Raises InvalidData for an item that the engine refuses, EngineFailed if it ends by itself.
    """
    max_open = version.engine.max_num_seqs + 1  # one more, so that the engine never waits for us
    open_items: dict[str, Item] = {}
    with EngineProcess(folder) as engine:
        for number, item in enumerate(items):
            if len(open_items) >= max_open:
                yield _receive(engine, open_items)
            open_items[str(number)] = item
            engine.ask(str(number), item.request())
        while open_items:
            yield _receive(engine, open_items)
        engine.finish()


def _receive(engine: EngineProcess, open_items: dict[str, Item]) -> Answered:
    try:
        answer = engine.receive()
    except RequestRefused as refusal:
        raise InvalidData(f"{open_items[refusal.request_id].place}: {refusal.reason}") from refusal
    return Answered(open_items.pop(answer.request_id), answer)
