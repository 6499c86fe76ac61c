"""Calls timed in turns, so that what else the machine does falls on every contestant alike. No torch in here."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

LEAST_TURNS = 5
TURNS = 10  # aimed at
P95_FROM = 20  # calls; with fewer the 95th percentile is all but the slowest of them
MIDDLE = (25, 75)

Turns = dict[str, list[list[float]]]


def take_turns(
    contestants: Mapping[str, Callable[[], Any]],
    seconds: float,
    *,
    clock: Callable[[], float] = time.perf_counter,
    around: Callable[[str, Callable[[], None]], None] = lambda name, turn: turn(),
) -> Turns:
    """The time of every call, in seconds of the clock, by contestant and turn.

    A turn lasts a tenth of ``seconds``, and at least one call of one contestant; the order is the other way round in every
    second turn. Ends when every contestant has had ``seconds`` and `LEAST_TURNS` turns. A call must return only once its
    work is done. ``around`` gets each turn to run, to read a meter before and after.
    """
    turns: Turns = {name: [] for name in contestants}
    names = list(contestants)
    while True:
        for name in names if len(turns[names[0]]) % 2 == 0 else reversed(names):
            took: list[float] = []
            around(name, functools.partial(_turn, contestants[name], seconds / TURNS, clock, took))
            turns[name].append(took)
        spent = min(sum(map(sum, found)) for found in turns.values())
        if len(turns[names[0]]) >= LEAST_TURNS and spent >= seconds:
            return turns


def _turn(call: Callable[[], Any], seconds: float, clock: Callable[[], float], took: list[float]) -> None:
    now = begin = clock()
    while not took or now - begin < seconds:
        before = now
        call()
        now = clock()
        took.append(now - before)


def latency(turns: Sequence[Sequence[float]]) -> dict[str, float | int | None]:
    """Milliseconds of a call: median, 95th percentile (None below `P95_FROM` calls), mean; and the number of calls."""
    calls = 1e3 * np.array([one for turn in turns for one in turn])
    p95 = float(np.percentile(calls, 95)) if len(calls) >= P95_FROM else None
    return {"p50": float(np.median(calls)), "p95": p95, "mean": float(calls.mean()), "num_calls": len(calls)}


def ratio(turns: Turns, slower: str, faster: str) -> dict[str, float | int]:
    """How many times as long a call of one takes as one of another: median over turns with its middle half."""
    pairs = zip(turns[slower], turns[faster], strict=True)
    ratios = [statistics.median(one) / statistics.median(other) for one, other in pairs]
    lo, hi = np.percentile(ratios, MIDDLE)
    return {"median": float(np.median(ratios)), "lo": float(lo), "hi": float(hi), "num_turns": len(ratios)}
