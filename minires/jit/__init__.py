"""A module with less Python around its kernels: what a call computes is recorded, and then only that runs.

    fast = minires.jit.trace(minires.nn.fuse_for_inference(model))
    with minires.no_grad():
        y = fast(x)                  the first call records, the second checks, from the third on launches are replayed

    fast = minires.jit.trace(model)
    loss = cross_entropy(fast(x), targets)  in training: training.py; the rest of this page is about inference
    loss.backward()

Around the kernel of a convolution that takes 1 ms there are 0.1 ms of Python: modules call modules, arguments are
looked at, a policy is asked for its precision. For inputs of the same shapes it all comes out the same. A recording
keeps of each op its `Function.forward`, its parameters, and which arrays it takes and makes; what depends on weights
alone (a filter in bfloat16) is computed once. A ResNet-20's forward pass takes 0.83 of the time, a ResNet-50's 0.91.

Of that, on the CPU, the third call notes which compiled functions were called with which memory (launched.py), and
later ones call them again: a ResNet-20 takes 0.8 of the time that is left, a ResNet-50 0.92, single images 0.16 to
0.75. Where that is faster, some images of a batch at a time go through the early layers (parts.py): a ResNet-50 in
bfloat16 then takes 0.9. The ops run instead where they did anything more, which is seen on random numbers; while
kernels are chosen, measured or observed; and in a second thread at the same time. Results are copies.

There is a recording per shapes, dtypes and devices of the inputs and per precision. It is made again when a weight was
replaced or written into by anything that `Tensor.version` counts, or when a module was changed. The module itself runs
wherever there is more to do than compute: in training mode without gradients, with hooks or `capture`, and for
arguments that are not tensors. What a recording cannot see is a forward that computes outside of ops (NumPy, indices
such as argmax's), or decides by values: the second call compares it with the module, and raises where they differ.

Source: the name, and `check_trace`, are torch.jit.trace's; the rules when to record anew torch.compile's guards.
"""

from __future__ import annotations

from typing import Any

from ..device import CPU, to_device
from ..engine import Tensor, state
from ..nn.module import Module
from .recording import Recording, record
from .training import Training

__all__ = ["Traced", "trace"]
_MOST = 16  # recordings of a trace; the oldest makes place


class Traced(Module):
    """A module that computes what `model` does, from recordings. See the head of this page."""

    def __init__(self, model: Module, check_trace: bool = True):
        super().__init__()
        self.model, self.check_trace = model, check_trace
        self.recordings: dict[Any, Recording] = {}
        self.training_step = Training()
        self.train(model.training)

    def __getstate__(self) -> dict[str, Any]:
        """A copy records anew."""
        return {**vars(self), "recordings": {}}

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """What `model(*inputs, **options)` returns."""
        if state.grad_enabled and not options and len(inputs) == 1 and isinstance(inputs[0], Tensor):
            y = self.training_step(self.model, inputs[0])
            return self.model(*inputs) if y is None else y
        if state.grad_enabled or state.hooks or options or not all(isinstance(x, Tensor) for x in inputs):
            return self.model(*inputs, **options)
        twice = [i for i, x in enumerate(inputs) if any(x.array is y.array for y in inputs[:i])]
        key = (*[(x.shape, x.dtype, x.device) for x in inputs], *twice, *state.autocast.items(), state.fuse)
        recording = self.recordings.get(key)
        if recording is None or recording.is_stale():
            if any(map(_does_more, self.model.modules())):
                return self.model(*inputs)
            self.recordings.pop(key, None)
            while len(self.recordings) >= _MOST:
                self.recordings.pop(next(iter(self.recordings)), None)
            self.recordings[key], result = record(self.model, inputs)
            return result
        arrays = [x.array for x in inputs]
        if (recording.checked or not self.check_trace) and (results := recording.relaunch(arrays)) is not None:
            return results
        to_check = self.check_trace and not recording.checked
        twins = [Tensor(x.array.copy("K")) for x in inputs] if to_check else []  # the ops may write into their inputs
        y = recording.replay(inputs)
        if to_check:
            if not _same(y, self.model(*twins)):
                self.recordings.pop(key, None)
                raise RuntimeError(
                    f"the recording of {type(self.model).__name__} does not compute what the module does: its forward "
                    "decides by values, or computes outside of minires' ops (argmax, NumPy); call the module itself"
                )
            recording.checked = True
        return y


def trace(model: Module, check_trace: bool = True) -> Traced:
    """A module that computes what `model` does, with less Python: see the head of this page, and training.py.

    model: for inference in evaluation mode, usually what `nn.fuse_for_inference` made; for training as it is. It is not
    copied: its weights may change, and are seen. For inference it returns a Tensor, or a tuple or list of them; for
    training on the CPU it takes and returns one Tensor, and another module runs itself. Each of at most 16 recordings
    keeps the memory of a pass, up to 256 MiB (the launches of larger passes are not kept), and in training one shape of
    inputs that of a step. check_trace: compare the second call of each recording with the module; RuntimeError where
    they differ, TypeError at the first for any other result.
    """
    return Traced(model, check_trace)


def _does_more(module: Module) -> bool:
    """Whether a call of the module is more than its ops."""
    return bool(module.training or module._forward_pre_hooks or module._forward_hooks or module._backward_hooks)


def _same(a: Any, b: Any) -> bool:
    """Whether two results are the same bits."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and _bytes(a) == _bytes(b)
    return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))


def _bytes(x: Tensor) -> bytes:
    return to_device(x.array, CPU).tobytes()
