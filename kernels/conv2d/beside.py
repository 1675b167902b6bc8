"""Kernels that do what a convolution's do, and something more in the same pass: of a problem of their own, each under
the name of the one that it is beside. So the op gets more where that kernel was chosen (`dispatch.run_with`), by rank,
by hand or by measuring, and nobody has to choose twice."""

from __future__ import annotations

from ..registry import EPS_OF_BFLOAT16, kernel, kernels


def register_beside(problem, convolution, fn, *, supports, scale, note, dtypes=("float32", "float64", "bfloat16")):
    """Register `fn` as a kernel of `problem` beside each of `convolution`'s on the CPU.

    supports(*arrays, **params): what is asked beyond what they support, who are asked without the problem's further
    arrays. scale(of_convolution, finer): the error scale of the whole, of theirs and of how many eps of float32 are one
    of theirs. note: what follows their names. dtypes: which of theirs it takes.
    """
    for base in [k for k in kernels(device="cpu") if k.fn is convolution]:
        own, finer = base.problem, EPS_OF_BFLOAT16 if "bfloat16" in base.dtypes else 1.0
        count = len(own.arguments)
        kernel(
            problem,
            device="cpu",
            step=base.step,
            note=f"{base.name}, {note}",
            supports=_both(supports, base.supports, count),
            rank=base.rank and _of_first(base.rank, count),
            error_factor=base.error_factor,
            dtypes=tuple(dtype for dtype in base.dtypes if dtype in dtypes),
            error_scale=scale(base.error_scale or own.error_scale, finer),
            exact=base.exact,
            name=base.name,
        )(fn)


def _both(supports, of_base, count):
    return lambda *arrays, **params: supports(*arrays, **params) and of_base(*arrays[:count], **params)


def _of_first(rank, count):
    return lambda *arrays, **params: rank(*arrays[:count], **params)
