"""Windows over a stream of tokens: each token is scored once, with enough before it."""

from __future__ import annotations

import pytest

from exporters.evaluate.perplexity import Window, WindowQueue

pytestmark = pytest.mark.unit

FIRST = -1


def windows_of(ids: list[int], size: int, stride: int, step: int) -> list[Window]:
    queue = WindowQueue(FIRST, size, stride, "here")
    found = [window for i in range(0, len(ids), step) for window in queue.add(ids[i : i + step])]
    return [*found, *queue.rest()]


@pytest.mark.parametrize(("size", "stride"), [(8, 3), (8, 7), (8, 1), (2, 1), (9, 4), (100, 50)])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 31])
@pytest.mark.parametrize("step", [1, 5, 100])
def test_every_token_is_scored_once_behind_the_tokens_before_it(size, stride, length, step):
    ids = list(range(length))
    windows = windows_of(ids, size, stride, step)
    assert [i for window in windows for i in window.ids[-window.num_scored :]] == ids
    position = 0
    for window in windows:
        num_context = len(window.ids) - window.num_scored
        assert list(window.ids[:num_context]) == [FIRST, *ids][position + 1 - num_context : position + 1]
        assert len(window.ids) <= size
        assert window is windows[0] or num_context == size - stride
        position += window.num_scored


def test_windows_do_not_depend_on_how_the_tokens_come():
    assert windows_of(list(range(50)), 8, 3, 1) == windows_of(list(range(50)), 8, 3, 50)
