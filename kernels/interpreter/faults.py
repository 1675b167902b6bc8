"""What the interpreter reports: one exception, with the name of what went wrong."""

from __future__ import annotations

KINDS = {
    "out of bounds": "an address outside every array of the launch, or outside the block's shared memory",
    "misaligned": "an address that is no multiple of the size that is read or written there",
    "uninitialised": "shared or local memory read before anything was written there",
    "race": "two threads touch the same bytes, one of them writes, and nothing orders the two",
    "in flight": "memory or registers of an asynchronous copy or wgmma touched before it was waited for",
    "divergent": "an instruction that a whole warp must execute together is reached by a part of it",
    "deadlock": "threads wait for what never comes",
    "bad descriptor": "a matrix descriptor or tensor map that does not describe memory as it lies",
    "bad use": "operands that the PTX ISA leaves undefined",
}


class Fault(Exception):
    """A kernel did what it must not. kind: one of KINDS. The message names thread, instruction and source line."""

    def __init__(self, kind: str, message: str):
        assert kind in KINDS, kind
        super().__init__(f"{kind}: {message}")
        self.kind = kind
