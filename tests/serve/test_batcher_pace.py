"""Estimates of Super's time and of the traffic, and what they say about waiting."""

from __future__ import annotations

import math
from statistics import median

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elang.serve.pace import LULL, MEMORY, WINDOW, Pace


def test_nothing_is_known_at_first():
    pace = Pace()
    assert pace.seconds(1, 0.0) == pace.seconds(32, 0.0) == 0.0
    assert pace.call_cost(0.0) == 0.0
    assert pace.gap(0.0) == math.inf
    assert not pace.waiting_pays(1, 0.0)


@given(st.lists(st.floats(0.001, 10), min_size=1, max_size=30))
def test_a_size_takes_the_median_of_its_last_calls(times):
    pace = Pace()
    for seconds in times:
        pace.took(0.0, 4, seconds)
    assert pace.seconds(4, 0.0) == pace.seconds(3, 0.0) == median(times[-WINDOW:])


def test_other_sizes_are_estimated_from_above():
    pace = Pace()
    pace.took(0.0, 2, 0.2)
    pace.took(0.0, 16, 0.8)
    assert [pace.seconds(rows, 0.0) for rows in (1, 2, 3, 9, 16)] == [0.2, 0.2, 0.8, 0.8, 0.8]
    assert pace.seconds(32, 0.0) == pytest.approx(1.6)


def test_old_calls_are_forgotten():
    pace = Pace()
    pace.took(0.0, 1, 5.0)
    pace.took(MEMORY - 1, 32, 1.0)
    assert pace.seconds(1, MEMORY - 1) == 5.0
    pace.took(MEMORY + 1, 32, 1.0)
    assert pace.seconds(1, MEMORY + 1) == 1.0
    assert pace.seconds(32, 2 * MEMORY + 2) == 0.0
    assert pace.call_cost(2 * MEMORY + 2) == 0.0


@given(st.floats(0, 0.1), st.floats(0, 0.1), st.sets(st.integers(0, 6), min_size=2))
def test_the_cost_of_a_call_is_what_no_row_accounts_for(fixed, per_row, powers):
    pace = Pace()
    for power in powers:
        pace.took(0.0, 2**power, fixed + per_row * 2**power)
    assert pace.call_cost(0.0) == pytest.approx(fixed, abs=1e-9)


def test_the_cost_of_a_call_is_no_more_than_a_call_and_no_less_than_nothing():
    for few, many in ((0.5, 0.1), (0.1, 9.0)):
        pace = Pace()
        pace.took(0.0, 1, few)
        pace.took(0.0, 32, many)
        assert 0 <= pace.call_cost(0.0) <= few


@given(st.floats(10, 1e4), st.integers(1, 8))
def test_the_gap_is_that_of_steady_traffic(rate, rows):
    pace, seconds = Pace(), 20 * LULL
    times = np.arange(0, seconds, rows / rate)
    for now in times:
        pace.arrived(float(now), rows)
    # Right after an arrival the faded count is high by up to its rows.
    expected = LULL * rate
    assert LULL / (expected + rows) * 0.999 <= pace.gap(float(times[-1])) <= LULL / max(expected - rows, 0.1)
    assert pace.gap(seconds + 100 * LULL) > 1.0


@pytest.mark.parametrize(
    ("gap", "fixed", "rows", "pays"),
    [(0.001, 0.010, 1, True), (0.001, 0.010, 9, True), (0.001, 0.010, 11, False), (0.020, 0.010, 1, False)],
)
def test_waiting_pays_where_it_delays_less_than_it_saves(gap, fixed, rows, pays):
    pace = Pace()
    pace.arrived(0.0, 1)
    pace._arrivals = LULL / gap
    pace.took(0.0, 1, fixed + 0.002)
    pace.took(0.0, 16, fixed + 0.032)
    assert pace.waiting_pays(rows, 0.0) is pays


def test_where_time_goes_with_the_rows_nobody_waits():
    pace = Pace()
    pace.arrived(0.0, 1000)
    for rows in (1, 4, 32):
        pace.took(0.0, rows, 0.01 * rows)
    assert not pace.waiting_pays(1, 0.0)
