"""Each thread of a launch on a processor of its own.

A system should see to that by itself, and mostly does. In a virtual machine it may not (Linux 6.18 under KVM): it takes
a sleeping processor for one that its host has taken away, wakes OpenMP's second thread beside the first, and leaves
both there for seconds, at 0.8 of one processor's speed, while the other processor sleeps on. To bind all threads for
good (OMP_PROC_BIND) would help, and bind what inherits from the caller's as well: a data loader's workers, another
library's threads. So the pool's workers, which run nothing but kernels, are bound where no other of them is, and
the thread that launches only for as long as a launch takes, elsewhere if a worker has its place: 5 microseconds.
"""

from __future__ import annotations

import ctypes
import sys

import numpy as np
from llvmlite import binding
from numba import carray, types

from .jit import helper

_PLACES = 1024  # processors that are told apart: as many as glibc's cpu_set_t has
_WORDS = _PLACES // 64
_SET = _PLACES // 8  # bytes of a set of processors, a bit for each
# What the threads of a launch note for each other, in numbers of 64 bits: who launched (0: none but it takes part),
# where that one may run, a set to tell the system, and who is where.
_ALLOWED, _CHOSEN, _TAKEN = slice(1, 1 + _WORDS), slice(1 + _WORDS, 1 + 2 * _WORDS), 1 + 2 * _WORDS
NOTES = _TAKEN + _PLACES
BOUND = "minires_bound_workers"  # a symbol: which worker of this process is bound where, 0 for none
_bound = np.zeros(_PLACES, np.uint64)
binding.add_symbol(BOUND, _bound.ctypes.data)

_place = types.ExternalFunction("sched_getcpu", types.int32())
_thread = types.ExternalFunction("pthread_self", types.uint64())
_ask = types.ExternalFunction("sched_getaffinity", types.int32(types.int32, types.int64, types.int64))
_tell = types.ExternalFunction("sched_setaffinity", types.int32(types.int32, types.int64, types.int64))

if sys.platform == "linux" and all(hasattr(ctypes.CDLL(None), name) for name in ("sched_getcpu", "pthread_self")):

    @helper()
    def prepare(pointer):
        """Before several threads are launched. pointer: to NOTES zeros."""
        notes = carray(pointer, NOTES, np.uint64)
        if _ask(0, _SET, notes[_ALLOWED].ctypes.data) == 0:
            notes[0] = _thread()

    @helper()
    def take_place(pointer, bound_pointer):
        """Where a thread begins a task; only its first in a launch changes anything."""
        notes, bound = carray(pointer, NOTES, np.uint64), carray(bound_pointer, _PLACES, np.uint64)
        here, this, taken = _place(), _thread(), notes[_TAKEN:]
        if notes[0] == 0 or not 0 <= here < _PLACES or taken[here] == this:
            return
        if not _is_free(here, this, taken, bound):
            here = _another(this, notes[_ALLOWED], taken, bound, here)
            if taken[here] != 0:  # more threads than places: the system shares them out
                return
        taken[here] = this
        if this == notes[0]:
            _bind(notes[_CHOSEN], here)
        elif bound[here] != this:
            for place in range(_PLACES):
                if bound[place] == this:
                    bound[place] = 0
            bound[here] = this
            _bind(np.zeros(_WORDS, np.uint64), here)

    @helper()
    def release(pointer):
        """After the launch, in the thread that launched."""
        notes = carray(pointer, NOTES, np.uint64)
        if notes[0] != 0:
            _tell(0, _SET, notes[_ALLOWED].ctypes.data)

else:  # what the system does not tell cannot be changed

    @helper()
    def prepare(pointer):
        pass

    @helper()
    def take_place(pointer, bound_pointer):
        pass

    @helper()
    def release(pointer):
        pass


@helper()
def _is_free(place, this, taken, bound):
    return taken[place] == 0 and (bound[place] == 0 or bound[place] == this)


@helper()
def _another(this, allowed, taken, bound, here):
    """A place for this thread: free, or at least not of this launch, or where it is."""
    second = here
    for place in range(_PLACES):
        if allowed[place // 64] >> np.uint64(place % 64) & np.uint64(1):
            if _is_free(place, this, taken, bound):
                return place
            if taken[second] != 0 and taken[place] == 0:
                second = place
    return second


@helper()
def _bind(chosen, place):
    chosen[:] = 0
    chosen[place // 64] = np.uint64(1) << np.uint64(place % 64)
    _tell(0, _SET, chosen.ctypes.data)
