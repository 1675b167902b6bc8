"""Some images of a batch at a time, so that an op finds in the second-level cache what the one before it made.

The early layers of a ResNet have large images and small filters: of a whole batch each op reads from beyond the cache
what the last one wrote there, and two images at a time go from op to op within it. (AMX, 8 images of 224x224 in
bfloat16: layer1 of a ResNet-50 takes 13.2 ms, in parts of two 9.1.) The late layers have small images and large
filters, which would be read for every part; there the batch stays whole.

It is for launches alone, to which a part means more calls, and not as much Python as to ops.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..autocast import Cast
from ..dispatch import cache_bytes, from_order, order_of
from ..ops.conv import Conv2d
from ..ops.fused import ConvBiasAct
from ..ops.pooling import AvgPool2d, MaxPool2d

if TYPE_CHECKING:
    from .recording import Recording, Step

# Ops of which each image of the result is of one image alone, and which of their inputs have images.
_OF_IMAGES = {AvgPool2d: (0,), Cast: (0,), Conv2d: (0,), ConvBiasAct: (0, 3), MaxPool2d: (0,)}
_CALL = 1 << 18  # bytes that can be moved while Python makes a call


class Array(NamedTuple):
    """What is to be known of a value."""

    nbytes: int
    dtype: Any
    order: tuple[int, ...]  # of its axes in memory
    memory: tuple[int, ...]  # its shape there


def about(a: np.ndarray) -> Array:
    """It, of an array."""
    order = order_of(a)
    return Array(a.nbytes, a.dtype, order, tuple(a.shape[axis] for axis in order))


class Stretch(NamedTuple):
    """Steps that so many images at a time go through. enter, leave: the values that they take and hand on."""

    first: int
    last: int  # the one after it
    images: int
    enter: frozenset[int]
    leave: frozenset[int]


def divide(recording: Recording, arrays: dict[int, Array], n: int, threads: int) -> list[list[Stretch]]:
    """Ways to run it with some of n images at a time, each with one stretch more than the one before.

    arrays: about its inputs and what its steps make. A part has at least an image for each thread, and as many as let
    the largest op from there on find what it reads and writes in the threads' second-level caches. A stretch ends where
    more bytes of filters would be read again than are spared.
    """
    images, most = [n] * len(recording.steps), 1
    for i, step in reversed([*enumerate(recording.steps)]):
        most = max(most, _moved(step, arrays) // n)
        if _is_of_images(step, recording.values, arrays, n):
            images[i] = threads
            while 2 * images[i] * most <= threads * cache_bytes():
                images[i] *= 2
    stretches, start = list[Stretch](), 0
    for size, run in itertools.groupby(images):
        end = start + len([*run])
        if size < n and (length := _worth(recording, arrays, range(start, end), -(-n // size))):
            stretches.append(_stretch(recording, arrays, start, start + length, size))
        start = end
    return [stretches[: k + 1] for k in range(len(stretches))]


def _is_of_images(step: Step, constants: list[Any], arrays: dict[int, Array], n: int) -> bool:
    """Whether it computes each image of its result of one of what it is given, and of constants."""
    of_images = [step.inputs[k] for k in _OF_IMAGES.get(step.function, ()) if k < len(step.inputs)]
    made = {k for k in step.inputs if k in arrays}
    missing = [k for k in of_images if k not in made and constants[k] is not None]
    others = [a for a in (arrays[k] for k in (*made, step.output)) if (a.order[:1], a.memory[:1]) != ((0,), (n,))]
    return bool(made) and made <= {*of_images} and not missing and not others


def _moved(step: Step, arrays: dict[int, Array]) -> int:
    """Bytes of images that it reads and writes."""
    return arrays[step.output].nbytes + sum(arrays[k].nbytes for k in step.inputs if k in arrays)


def _worth(recording: Recording, arrays: dict[int, Array], steps: range, parts: int) -> int:
    """How many of these steps to take, so that the most is gained."""
    gained = [0]
    for step in (recording.steps[i] for i in steps):
        filters = sum(getattr(recording.values[k], "nbytes", 0) for k in step.inputs if k not in arrays)
        gained.append(gained[-1] + _moved(step, arrays) - (parts - 1) * (filters + _CALL))
    return gained.index(max(gained))


def _stretch(recording: Recording, arrays: dict[int, Array], first: int, last: int, images: int) -> Stretch:
    steps = recording.steps[first:last]
    made, done = {s.output for s in steps}, {k for s in steps for k in s.done}
    taken = {k for s in steps for k in s.inputs if k in arrays}
    return Stretch(first, last, images, frozenset(taken - made), frozenset(made - done))


def run_divided(
    recording: Recording, inputs: Sequence[Any], stretches: list[Stretch], arrays: dict[int, Array], pool: Any
) -> list[Any]:
    """What `recording.run(inputs)` computes; [] where a result cannot be made in its place."""
    values, begins, i = recording.values_with(inputs), {s.first: s for s in stretches}, 0
    with recording.constants.held():
        while i < len(recording.steps):
            if (stretch := begins.get(i)) is None:
                recording.steps[i].run(values)
            elif not _run_stretch(recording, stretch, values, arrays, pool):
                return []
            i = stretch.last if stretch else i + 1
    return [values[k] for k in recording.outputs]


def _run_stretch(
    recording: Recording, stretch: Stretch, values: list[Any], arrays: dict[int, Array], pool: Any
) -> bool:
    """Put what the stretch makes into `values`; False where an op did not make its part of a result in its place."""
    steps, n = recording.steps[stretch.first : stretch.last], values[min(stretch.enter)].shape[0]
    wholes = {k: pool.array(arrays[k].memory, arrays[k].dtype, arrays[k].nbytes) for k in stretch.leave}
    for start in range(0, n, stretch.images):
        part, some = values.copy(), slice(start, start + stretch.images)
        for k in stretch.enter:
            part[k] = values[k][some]
        for step in steps:
            place = wholes[step.output][some] if step.output in wholes else None
            with pool.next_is(place):
                step.run(part)
            if place is not None and not np.may_share_memory(part[step.output], place):
                return False
    for k in {k for step in steps for k in step.done}:
        values[k] = None
    for k, whole in wholes.items():
        values[k] = from_order(whole, arrays[k].order)
    return True
