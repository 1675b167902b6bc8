"""Rivals measured in turn, so that a slow spell of the machine hits them all, and their ratios round by round."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from minires.kernels.timing import Timing, timing  # pyright: ignore[reportMissingImports]

Rival = Callable[[float], float]  # seconds that a turn should last -> seconds per call
Samples = dict[str, list[float]]  # by rival: seconds per call, round by round


def in_turn(rivals: Mapping[str, Rival], seconds: float, turn: float, pause: float, least: int = 5) -> Samples:
    """Measure the rivals round by round, for so many seconds in all but at least `least` rounds.

    turn: seconds of one measurement. pause: seconds of sleep before each, in which the threads of the one before stop
    spinning. Every other round goes backwards, so that nobody always follows the same neighbour.
    """
    samples: Samples = {name: [] for name in rivals}
    order, stop, rounds = list(rivals), time.perf_counter() + seconds, 0
    while rounds < least or time.perf_counter() < stop:
        for name in order:
            time.sleep(pause)
            samples[name].append(rivals[name](turn))
        order.reverse()
        rounds += 1
    return samples


def best(samples: Samples, among: list[str]) -> str | None:
    """The name with the shortest median; None where there is nobody."""
    return min(among, key=lambda name: timing(samples[name]).median, default=None)


def ratio(samples: Samples, ours: str, theirs: str) -> Timing:
    """Our time over theirs, round by round: below 1 we are faster."""
    return timing([a / b for a, b in zip(samples[ours], samples[theirs], strict=True)])
