"""Experiments on backpropagation through skip connections: `minires study list`, or from Python

    found = minires.study.gradients(depths=(20, 56))
    print(found)      # tables, and the literature beside them
    found.plot()      # a matplotlib figure

Each experiment is one file that reads as an explanation, and one function of its name. In a notebook its result shows
itself. `trace` walks through one training step of a network, op by op.
"""

from collections.abc import Callable

from .branches import Branches, branches
from .gradients import Gradients, gradients
from .lesion import Lesion, lesion
from .result import Finding, Result, Table
from .shatter import Shatter, shatter
from .toposort import Toposort, toposort
from .trace import Trace, trace, walk

EXPERIMENTS: dict[str, Callable[..., Result]] = {
    f.__name__: f for f in (toposort, gradients, branches, lesion, shatter)
}

__all__ = [
    "EXPERIMENTS",
    "Branches",
    "Finding",
    "Gradients",
    "Lesion",
    "Result",
    "Shatter",
    "Table",
    "Toposort",
    "Trace",
    "branches",
    "gradients",
    "lesion",
    "shatter",
    "toposort",
    "trace",
    "walk",
]
