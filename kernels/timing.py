"""Timing on a machine that does other things too: what is compared runs in turn, and the spread is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Seconds per call: how many calls were timed, their median and their 20th and 80th percentile."""

    n: int
    median: float
    p20: float
    p80: float


def timing(samples: list[float]) -> Timing:
    """What a list of measured seconds comes to."""
    return Timing(len(samples), *np.percentile(samples, [50, 20, 80]).tolist())


def in_turn(
    calls: Mapping[str, Callable[[], object]], seconds: float = 1.0, least: int = 5, pause: float = 0.0
) -> dict[str, Timing]:
    """Time the calls round by round, each once per round, so that a slow spell of the machine hits them all.

    seconds: for all calls together, after a first round that is not counted (it compiles and warms caches); but at
    least `least` rounds. pause: seconds of sleep before each call, in which another library's threads stop spinning.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    stop = time.perf_counter() + seconds
    rounds = 0
    while rounds < least or time.perf_counter() < stop:
        for name, call in calls.items():
            time.sleep(pause)
            start = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: timing(s) for name, s in samples.items()}
