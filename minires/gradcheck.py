"""Is a backward right? Compare it with derivatives that need none, in float64.

With a random upstream gradient v and a random direction u of one input at a time,

    <backward(v), u>   must be   d/dt <v, fn(x + t u)>  at t = 0.

Two ways to the right-hand side:

    complex      Im <v, fn(x + i h u)> / h  with h = 1e-30: no subtraction, so no cancellation; exact to rounding.
                 Needs code that takes complex numbers and is analytic (abs and comparisons are not).
    directional  central differences at three steps, extrapolated to step 0 (Richardson).

v is random because a plain sum hides errors: sum(batch_norm(x)) does not depend on x at all.

Functions with kinks (ReLU, max) have points where no derivative exists, and a difference across one is wrong. There
the slopes on both sides differ however small the step, or estimates at several steps disagree. Then the step shrinks,
then the point is moved a little, and only then is it reported as a kink: never as a wrong gradient.

Sources: complex step: Squire & Trapp 1998, SIAM Review 40(1), 110-112. Random directions, and fitting values along the
direction to find kinks: Chainer's `gradient_check` (Tokui et al. 2019, arXiv:1908.00213).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .device import namespace_of
from .engine import Tensor, no_grad

EPS = float(np.finfo(np.float64).eps)
DIRECTIONS = 2  # per input
POINTS = 6  # the one that was given and, where that lies on a kink, others close to it
STEPS = (1e-3, 1e-4, 1e-5, 1e-6)  # of differences, relative to the input's size


class GradcheckError(RuntimeError):
    """A backward disagrees with the numeric derivative."""


class KinkError(GradcheckError):
    """There is no derivative to compare with: fn has a kink at this point and at others close to it."""


@dataclass
class _Numeric:
    """A directional derivative. noise: the rounding error that it may carry."""

    value: float
    noise: float
    how: str


def gradcheck(
    fn: Callable[..., Tensor],
    inputs: Tensor | Sequence[Tensor],
    *,
    seed: int = 0,
    method: Literal["auto", "complex", "directional"] = "auto",
    rtol: float | None = None,
    atol: float = 1e-12,
    raise_exception: bool = True,
) -> bool:
    """Whether backward through `fn(*inputs)`, which returns one Tensor, gives the right gradients.

    inputs: float64 leaves; those that require gradients are checked, each with two random directions. Their arrays are
    exchanged meanwhile, so parameters may be among them: `gradcheck(lambda *_: model(x), [*model.parameters()])`.
    method: "auto" takes the complex step where it works and agrees roughly with differences, else differences.
    rtol: relative to the derivative's size, by default 1e-8 for the complex step and 1e-6 for differences; atol is
    added.

    Raises GradcheckError naming the inputs whose gradients are wrong, KinkError where no derivative exists (with
    raise_exception=False, returns False for both); TypeError or ValueError for inputs that cannot be checked.
    """
    inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    if method not in ("auto", "complex", "directional"):
        raise ValueError(f"method={method!r} must be 'auto', 'complex' or 'directional'")
    check = _Check(fn, inputs, np.random.default_rng(seed), method, rtol, atol)
    given = [(t, t.array, t.grad) for t in inputs]
    try:
        check.run()
    except GradcheckError:
        if raise_exception:
            raise
        return False
    finally:
        for t, array, grad in given:
            t.array, t.grad = array, grad
    return True


class _Check:
    def __init__(self, fn: Any, inputs: tuple[Tensor, ...], rng: Any, method: str, rtol: float | None, atol: float):
        self.fn, self.inputs, self.rng, self.method, self.rtol, self.atol = fn, inputs, rng, method, rtol, atol
        for i, t in enumerate(inputs):
            if not isinstance(t, Tensor):
                raise TypeError(f"gradcheck: input {i} is a {type(t).__name__}, not a Tensor")
            if t.requires_grad and t.dtype != np.float64:
                raise TypeError(f"gradcheck: input {i} is {t.dtype}; differences need float64: use .to('float64')")
            if t.requires_grad and t.node is not None:
                raise ValueError(f"gradcheck: input {i} was computed by {t.node.name}; pass a leaf: use .detach()")
        self.checked = [i for i, t in enumerate(inputs) if t.requires_grad]
        if not self.checked:
            raise ValueError("gradcheck: no input requires gradients")
        self.points = [t.array for t in inputs]

    def run(self) -> None:
        """At the given point or, if it lies on a kink, at one close to it."""
        given, kink = self.points, ""
        for attempt in range(POINTS):
            if attempt:
                self.points = [p + 0.03 * self.draw(p) if i in self.checked else p for i, p in enumerate(given)]
            kink = self.at_point()
            if not kink:
                return
        raise KinkError(f"gradcheck: {kink}, and at {POINTS - 1} points close by too")

    def at_point(self) -> str:
        """Compare all inputs' gradients here. Returns "", or where there is a kink."""
        v, grads = self.analytic()
        wrong = {}
        for i in self.checked:
            for _ in range(DIRECTIONS):
                u = self.draw(self.points[i])
                found = float((grads[i] * u).sum())
                scale = float(((grads[i] * u) ** 2).sum()) ** 0.5  # what a random sum of these terms would come to
                numeric = self.numeric(i, u, v, max(abs(found), scale))
                if isinstance(numeric, str):
                    return numeric
                rtol = self.rtol if self.rtol is not None else 1e-8 if numeric.how == "complex step" else 1e-6
                allowed = self.atol + rtol * max(abs(found), abs(numeric.value), scale) + numeric.noise
                if not abs(found - numeric.value) <= allowed:
                    wrong[i] = (
                        f"input {i} (shape {self.points[i].shape}): analytic {found:.9g}, numeric {numeric.value:.9g} "
                        f"({numeric.how}; they may differ by {allowed:.1g})"
                    )
        if wrong:
            raise GradcheckError("gradcheck: wrong gradient of " + "; of ".join(wrong.values()))
        return ""

    def draw(self, like: Any) -> Any:
        """A random direction: no component vanishes, and it is as large as the point, but not larger than 1."""
        u = self.rng.uniform(0.5, 1.5, like.shape) * self.rng.choice((-1.0, 1.0), like.shape)
        size = float((like * like).mean()) ** 0.5 if like.size else 0.0
        return namespace_of(like).asarray(u * (min(size, 1.0) or 1.0))

    def analytic(self) -> tuple[Any, dict[int, Any]]:
        """A random upstream gradient, and what backward makes of it."""
        for t, point in zip(self.inputs, self.points, strict=True):
            t.array, t.grad = point, None
        y = self.fn(*self.inputs)
        if not isinstance(y, Tensor):
            raise TypeError(f"gradcheck: fn returned a {type(y).__name__}, not one Tensor")
        if not y.requires_grad or y.dtype != np.float64:
            what = "does not depend on an input that requires gradients" if not y.requires_grad else f"is {y.dtype}"
            raise ValueError(f"gradcheck: what fn returned {what}; it must be float64 and computed by ops")
        xp = namespace_of(y.array)
        if not bool(xp.isfinite(y.array).all()):
            raise ValueError("gradcheck: fn returned NaN or Inf at this point; choose inputs inside its domain")
        with no_grad():
            again = self.fn(*self.inputs)
        if not bool(xp.allclose(y.array, again.array, rtol=1e-12, atol=0)):
            raise ValueError("gradcheck: fn gave two results for one input; seed its random numbers inside fn")
        v = xp.asarray(self.rng.standard_normal(y.shape))
        y.backward(v)
        grads = [self.inputs[i].grad for i in self.checked]
        return v, {
            i: namespace_of(v).zeros_like(self.points[i]) if g is None else g.array.copy()
            for i, g in zip(self.checked, grads, strict=True)
        }

    def value(self, v: Any, changed: int, point: Any) -> tuple[Any, float]:
        """<v, fn(...)> with one input changed, and the magnitude that its rounding error is relative to.

        Where that input is complex all floating ones are: some ops want equal dtypes.
        """
        for i, (t, p) in enumerate(zip(self.inputs, self.points, strict=True)):
            t.array = point if i == changed else p.astype(point.dtype) if p.dtype == np.float64 else p
        with no_grad():
            y = self.fn(*self.inputs).array
        terms = v * y
        return terms.sum().item(), float(abs(terms).sum())

    def numeric(self, i: int, u: Any, v: Any, scale: float) -> _Numeric | str:
        """The derivative of <v, fn> along direction u of input i; a string where there is a kink."""
        if self.method == "complex":
            return self.complex_step(i, u, v)
        differences = self.differences(i, u, v, scale)
        if self.method == "directional" or isinstance(differences, str):
            return differences
        try:
            exact = self.complex_step(i, u, v)
        except (
            TypeError,
            ValueError,
            NotImplementedError,
            Warning,
        ):  # no complex kernel, or the imaginary part is lost
            return differences
        near = 1e-5 * max(abs(exact.value), scale) + differences.noise + exact.noise
        return exact if abs(exact.value - differences.value) <= near else differences  # else it is not analytic

    def complex_step(self, i: int, u: Any, v: Any) -> _Numeric:
        step = 1e-30
        with warnings.catch_warnings():
            warnings.simplefilter("error", np.exceptions.ComplexWarning)
            value, magnitude = self.value(v, i, self.points[i] + 1j * step * u)
        if not isinstance(value, complex):
            raise TypeError("gradcheck: fn made a real number of a complex one; use method='directional'")
        return _Numeric(value.imag / step, 16 * EPS * magnitude, "complex step")

    def differences(self, i: int, u: Any, v: Any, scale: float) -> _Numeric | str:
        middle, magnitude = self.value(v, i, self.points[i])
        for h in STEPS:
            steps = h, h / 2, h / 4
            ahead = [self.value(v, i, self.points[i] + t * u)[0] for t in steps]
            behind = [self.value(v, i, self.points[i] - t * u)[0] for t in steps]
            slope = [(a - b) / (2 * t) for a, b, t in zip(ahead, behind, steps, strict=True)]
            bend = [(a - 2 * middle + b) / t for a, b, t in zip(ahead, behind, steps, strict=True)]
            better = [(4 * slope[1] - slope[0]) / 3, (4 * slope[2] - slope[1]) / 3]  # without the error in h²
            best = (16 * better[1] - better[0]) / 15  # and in h⁴
            kink = (4 * bend[2] - bend[0]) / 3  # slope ahead minus slope behind, at step 0
            noise = 64 * EPS * magnitude / h
            allowed = 1e-7 * max(abs(best), scale) + noise
            if abs(better[1] - better[0]) <= allowed and abs(kink) <= 10 * allowed:
                return _Numeric(best, noise, "central differences")
        where = f"at a kink of fn along input {i} (shape {self.points[i].shape})"
        return f"{where}: the slopes ahead and behind differ by {kink:.3g}"
