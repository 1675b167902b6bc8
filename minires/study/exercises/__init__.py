"""Write an op's backward yourself, and have it graded by the checks that our own kernels must pass.

Each module here is a page to fill in: its docstring is the task, its functions raise "write me". The command
`minires study exercise NAME` copies it to a file of the learner's, and from then on grades that file with the checks
that this house's own kernels have to pass (`minires/cli/exercise.py`).
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from ...engine import Function
from ...ops.activation import ReLU
from ...ops.arithmetic import Add
from ...ops.batch_norm import BatchNorm
from ...ops.conv import Conv2d
from ...ops.pooling import MaxPool2d


@dataclass(frozen=True)
class Exercise:
    """name: also its module's. functions: what the learner writes. op: ours, to compare with afterwards. hints: from a
    nudge to nearly the answer. gradients: the names of the outputs, where a function has several."""

    name: str
    functions: tuple[str, ...]
    op: type[Function]
    hints: tuple[str, ...]
    gradients: tuple[str, ...] = ()

    @property
    def template(self) -> str:
        """The page to fill in, as text."""
        return Path(__file__).with_name(f"{self.name}.py").read_text(encoding="utf-8")

    @property
    def task(self) -> str:
        """The first line of the template's docstring."""
        return (ast.get_docstring(ast.parse(self.template)) or "").partition("\n")[0]


EXERCISES = {
    exercise.name: exercise
    for exercise in (
        Exercise(
            "relu",
            ("backward",),
            ReLU,
            (
                "The slope of max(x, 0) is 1 where x > 0 and 0 elsewhere. So dx is either dy or 0, number by number.",
                "Where y > 0, x was positive. Where y is exactly 0, x was not, and the convention says 0. Then is "
                "it > or >=?",
                "np.where(condition, one, other) chooses number by number; multiplying by the condition does as "
                "well. Both make a new array, as they should.",
            ),
        ),
        Exercise(
            "add",
            ("backward",),
            Add,
            (
                "The slope of a + b is 1 for both. Where a shape is that of dy, its gradient is dy. What remains is"
                " to undo the broadcast.",
                "A number that was stretched to many places gets the sum of the gradients of all of them. Two kinds"
                " of axes were stretched: those missing at the front of the shape, and those of length 1 where dy "
                "is longer.",
                "Write unbroadcast(dy, shape): first dy.sum(axis=tuple(range(dy.ndim - len(shape)))) for the "
                "missing axes, then .sum(axis=..., keepdims=True) over the axes where shape has 1. It does no harm "
                "to sum an axis of length 1.",
            ),
            ("da", "db"),
        ),
        Exercise(
            "batch_norm",
            ("backward",),
            BatchNorm,
            (
                "Begin with the easy two: beta is added m times in each channel and gamma multiplied m times, so "
                "dbeta and dgamma are sums over N, H and W. (C,) meets (N, C, H, W) as v[:, None, None].",
                "If mean and variance were constants, dx would be gamma * inv_std * dy. They are not: raise x[i] by"
                " d and the mean rises by d/m for all, and the variance by about 2 * (x[i] - mean) * d/m. Each of "
                "the two subtracts one term from dy inside the bracket.",
                "dx = gamma * inv_std * (dy - A - x_hat * B), where A is the mean of dy over N, H, W, and B the "
                "mean of dy * x_hat. You have both sums already: they are dbeta and dgamma.",
            ),
            ("dx", "dgamma", "dbeta"),
        ),
        Exercise(
            "conv2d",
            ("dgrad", "wgrad"),
            Conv2d,
            (
                "Read the formula as a list of products: each y[n, k, p, q] is a sum of x times w. Whoever reads a "
                "product backwards hands dy times the other factor to each factor: dx gets dy * w, dw gets dy * x.",
                "Loop over the output positions p and q. The window of (p, q) is xp[:, :, p*u : p*u+R, q*v : "
                "q*v+S]. For dgrad let dx have the size of xp, add to the window, and cut the padding off at the "
                "end; windows overlap, so add (+=), do not assign.",
                'dgrad: dxp[window] += np.einsum("nk,kcrs->ncrs", dy[:, :, p, q], w). wgrad: dw += '
                'np.einsum("ncrs,nk->kcrs", xp[window], dy[:, :, p, q]). np.pad(x, ((0, 0), (0, 0), (a, a), (b, '
                "b))) makes xp.",
            ),
        ),
        Exercise(
            "max_pool2d",
            ("backward",),
            MaxPool2d,
            (
                "Start from zeros for dx. All pixels that did not win keep their 0.",
                "Flatten the images of dx to (N, C, H * W): then indices are places along the last axis. Windows "
                "may overlap, and one pixel may win several: its gradients are added.",
                "dx[n, c, indices] += dy looks right but adds only once where an index repeats. np.add.at(dx, (n, "
                "c, indices), dy) adds every time; so does a loop over p and q, with one index per image and "
                "channel: n = np.arange(N)[:, None], c = np.arange(C).",
            ),
        ),
    )
}
