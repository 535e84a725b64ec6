"""The learning rate: a function of steps alone on a machine that keeps up, and always a whole cosine."""

from __future__ import annotations

import pytest

from control_plane.training.schedule import Schedule

pytestmark = pytest.mark.unit

SCHEDULE = Schedule(learning_rate=1.0, warmup_steps=10, max_steps=100, time_limit_s=60.0)


def test_learning_rate_warms_up_and_decays_to_zero() -> None:
    rates = [SCHEDULE.learning_rate_at(step, elapsed_s=0.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.1, rel=0.01)
    assert max(rates) == rates[9]
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[99] < 0.001


@pytest.mark.parametrize("total_s", [1.0, 30.0, 60.0])
def test_time_does_not_matter_to_a_run_that_finishes_in_time(total_s: float) -> None:
    for step in range(101):
        assert SCHEDULE.fraction(step, total_s * step / 100) == step / 100


def test_a_slow_run_ends_at_the_time_limit_with_its_decay_complete() -> None:
    seconds_per_step = 3.0
    fractions = [SCHEDULE.fraction(step, seconds_per_step * step) for step in range(21)]
    assert fractions == sorted(fractions)
    assert fractions[19] < 1.0 == fractions[20]
    assert SCHEDULE.learning_rate_at(19, 57.0) < 0.02


def test_no_time_left_means_stop() -> None:
    assert Schedule(1.0, 10, 100, time_limit_s=-1.0).fraction(0, 0.0) == 1.0
