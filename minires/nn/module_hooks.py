"""How a full backward hook sees the gradients of a module.

A module with a full backward hook gets two kinds of marks into its graph, ops that hand their input on unchanged: one
on its output, whose backward sees grad_output, and one on each positional input, whose backward sees grad_input. The
first input's mark is the oldest node of the call, so it is visited last, when all other gradients are known.
"""

from __future__ import annotations

from typing import Any

from ..engine import Function, Tensor


class Call:
    """One call of a module with full backward hooks: the gradients met so far."""

    def __init__(self, module: Any, inputs: int, marked: list[int]):
        self.module, self.marked = module, marked
        self.grad_output: Tensor | None = None
        self.grad_input: list[Tensor | None] = [None] * inputs

    def fire(self) -> Any:
        """Call the hooks; returns the gradient of the first marked input."""
        for hook in list(self.module._backward_hooks.values()):
            replaced = hook(self.module, tuple(self.grad_input), (self.grad_output,))
            if replaced is None:
                continue
            if len(self.marked) != 1:
                raise ValueError(f"a backward hook can replace the gradient of one input, not of {len(self.marked)}")
            new = tuple(replaced) if isinstance(replaced, (tuple, list)) else (replaced,)
            if len(new) != len(self.grad_input):
                raise ValueError(f"a backward hook returned {len(new)} gradients for {len(self.grad_input)} inputs")
            self.grad_input = list(new)
        grad = self.grad_input[self.marked[0]] if self.marked else None
        self.grad_input, self.grad_output = [None] * len(self.grad_input), None
        return None if grad is None else grad.array


class InputMark(Function):
    """y = x; backward shows dy to the call as the gradient of input `slot`."""

    @staticmethod
    def forward(ctx, x, *, call: Call, slot: int):
        return x

    @staticmethod
    def backward(ctx, dy):
        call, slot = ctx.params["call"], ctx.params["slot"]
        call.grad_input[slot] = Tensor(dy)
        return call.fire() if slot == call.marked[0] else dy


class OutputMark(Function):
    """y = x; backward shows dy to the call as the gradient of its output."""

    @staticmethod
    def forward(ctx, x, *, call: Call):
        return x

    @staticmethod
    def backward(ctx, dy):
        call = ctx.params["call"]
        call.grad_output = Tensor(dy)
        if not call.marked:  # no input needs a gradient: an image at the first layer
            call.fire()
        return dy


def mark_inputs(module: Any, args: tuple) -> tuple[tuple, Call]:
    """The positional arguments, those that require gradients marked; and the record of this call."""
    marked = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad]
    call, new = Call(module, len(args), marked), list(args)
    for slot in marked:
        new[slot] = InputMark.apply(args[slot], call=call, slot=slot)
    return tuple(new), call


def mark_output(call: Call, y: Any) -> Any:
    """The output, marked; modules with full backward hooks return one Tensor."""
    if not isinstance(y, Tensor):
        raise TypeError(f"a full backward hook needs a module that returns one Tensor, not {type(y).__name__}")
    return OutputMark.apply(y, call=call) if y.requires_grad else y
