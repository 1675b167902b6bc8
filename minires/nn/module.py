"""Module: a part of a network that owns parameters, buffers and other modules; and Parameter.

A module finds its parts by assignment: `self.conv1 = Conv2d(...)` registers a child, `self.weight = Parameter(...)` a
parameter. Names, order (of registration) and meaning of every method are PyTorch's, so that a state dict of
torchvision's ResNets fits ours. Calling a module runs its `forward` within `engine.state.scope`, which is how hooks
and error messages know the module in which an op ran.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import numpy as np

from ..device import Device, device, is_cuda_array, namespace_of, to_device
from ..engine import Handle, Scope, Tensor, state
from .module_hooks import mark_inputs, mark_output


class Parameter(Tensor):
    """A tensor that a module learns: a leaf that requires gradients, registered by assigning it to a module.

    data: a floating Tensor or array, which is shared, not copied.
    """

    __slots__ = ()

    def __init__(self, data: Any, requires_grad: bool = True):
        super().__init__(data.array if isinstance(data, Tensor) else data, requires_grad)
        if isinstance(data, Tensor):
            self.version = data.version

    def __repr__(self) -> str:
        return "Parameter containing:\n" + super().__repr__()


class StateDictError(ValueError, RuntimeError):
    """A state dict does not fit the module; nothing was loaded. (PyTorch raises RuntimeError, so it is one too.)"""


class LoadResult(NamedTuple):
    """What `load_state_dict(..., strict=False)` passed over."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Module:
    """Base class of everything with parameters. Subclasses call `super().__init__()` first and define `forward`.

    training: whether dropout and batch normalisation behave as in training; set by `train()` and `eval()`.
    """

    training: bool
    _changes = 0  # of all modules, counted: whoever remembers how a module was asks this (`minires.jit`)
    _optional_keys: tuple[str, ...] = ()  # buffers that old checkpoints lack: kept as they are when missing

    def __init__(self) -> None:
        for name in ("_parameters", "_buffers", "_modules", "_forward_pre_hooks", "_forward_hooks", "_backward_hooks"):
            object.__setattr__(self, name, {})
        object.__setattr__(self, "_transient", set())  # names of buffers that are no part of the state dict
        object.__setattr__(self, "training", True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the output; subclasses define it, callers call the module itself."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward()")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outer = state.scope
        state.scope = Scope(self, outer)
        try:
            for pre in list(self._forward_pre_hooks.values()):
                replaced = pre(self, args)
                if replaced is not None:
                    args = replaced if isinstance(replaced, tuple) else (replaced,)
            if self._backward_hooks:
                args, call = mark_inputs(self, args)
                y = mark_output(call, self.forward(*args, **kwargs))
            else:
                y = self.forward(*args, **kwargs)
            for hook in list(self._forward_hooks.values()):
                replaced = hook(self, args, y)
                y = y if replaced is None else replaced
            return y
        except AttributeError:
            if "_parameters" not in self.__dict__:
                raise AttributeError(f"{type(self).__name__}.__init__() must call super().__init__() first") from None
            raise
        finally:
            state.scope = outer

    # --- registration ---------------------------------------------------------------------------------------------

    def register_parameter(self, name: str, parameter: Parameter | None) -> None:
        """Add a parameter, or None where an optional one (a bias) is absent."""
        self._check_name(name, "parameters", "_parameters")
        if parameter is not None and not isinstance(parameter, Parameter):
            raise TypeError(
                f"{name!r} must be a Parameter or None, not {type(parameter).__name__}; wrap it: Parameter(...)"
            )
        self._parameters[name] = parameter

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Add a tensor that is state but is not learned (a running mean). persistent: part of the state dict."""
        self._check_name(name, "buffers", "_buffers")
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"buffer {name!r} must be a Tensor or None, not {type(tensor).__name__}")
        self._buffers[name] = tensor
        (self._transient.discard if persistent else self._transient.add)(name)

    def add_module(self, name: str, module: Module | None) -> None:
        """Add a child under a name that need not be an identifier (`Sequential` uses "0", "1", ...)."""
        self._check_name(name, "module", "_modules")
        if module is not None and not isinstance(module, Module):
            raise TypeError(f"{name!r} must be a Module or None, not {type(module).__name__}")
        self._modules[name] = module

    def _check_name(self, name: str, kind: str, table: str) -> None:
        Module._changes += 1
        if table not in self.__dict__:
            raise AttributeError(f"cannot assign {kind} before Module.__init__() call; call super().__init__() first")
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"name {name!r} must be a string that is not empty and has no '.'")
        if name not in self.__dict__[table] and hasattr(self, name):
            raise KeyError(f"attribute {name!r} of {type(self).__name__} exists already")

    def __setattr__(self, name: str, value: Any) -> None:
        Module._changes += 1
        d = self.__dict__
        if isinstance(value, Parameter):
            self._forget(name, "_buffers", "_modules")
            self.register_parameter(name, value)
        elif isinstance(value, Module):
            self._forget(name, "_parameters", "_buffers")
            self.add_module(name, value)
        elif name in d.get("_parameters", ()):
            if value is not None:
                raise TypeError(
                    f"cannot assign {type(value).__name__} to parameter {name!r}: use Parameter(...) or None"
                )
            d["_parameters"][name] = None
        elif name in d.get("_modules", ()):
            if value is not None:
                raise TypeError(f"cannot assign {type(value).__name__} to child module {name!r}: use a Module or None")
            d["_modules"][name] = None
        elif name in d.get("_buffers", ()):
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(f"cannot assign {type(value).__name__} to buffer {name!r}: use a Tensor or None")
            d["_buffers"][name] = value
        else:
            object.__setattr__(self, name, value)

    def _forget(self, name: str, *tables: str) -> None:
        for table in tables:
            self.__dict__.get(table, {}).pop(name, None)
        self.__dict__.pop(name, None)

    def __getattr__(self, name: str) -> Any:
        for table in ("_parameters", "_buffers", "_modules"):
            if name in self.__dict__.get(table, ()):
                return self.__dict__[table][name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __delattr__(self, name: str) -> None:
        Module._changes += 1
        for table in ("_parameters", "_buffers", "_modules"):
            if name in self.__dict__.get(table, ()):
                del self.__dict__[table][name]
                self._transient.discard(name)
                return
        object.__delattr__(self, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._parameters, *self._buffers, *self._modules})

    # --- walking the tree -----------------------------------------------------------------------------------------

    def named_modules(
        self, memo: set[int] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Module]]:
        """This module ("") and all below it, each with its dotted name; a shared one once."""
        memo = set() if memo is None else memo
        if id(self) in memo:
            return
        if remove_duplicate:
            memo.add(id(self))
        yield prefix, self
        for name, child in self._modules.items():
            if child is not None:
                yield from child.named_modules(memo, f"{prefix}.{name}" if prefix else name, remove_duplicate)

    def modules(self) -> Iterator[Module]:
        """This module and all below it."""
        for _, module in self.named_modules():
            yield module

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """The modules directly below this one; a shared one once."""
        seen = set()
        for name, child in self._modules.items():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                yield name, child

    def children(self) -> Iterator[Module]:
        """The modules directly below this one."""
        for _, child in self.named_children():
            yield child

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Parameter]]:
        """Every parameter with its dotted name, in order of registration; a shared one once."""
        return self._named("_parameters", prefix, recurse, remove_duplicate)

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """Every parameter, in order of registration; a shared one once."""
        for _, parameter in self.named_parameters(recurse=recurse):
            yield parameter

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Every buffer with its dotted name."""
        return self._named("_buffers", prefix, recurse, remove_duplicate)

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """Every buffer."""
        for _, buffer in self.named_buffers(recurse=recurse):
            yield buffer

    def _named(self, table: str, prefix: str, recurse: bool, remove_duplicate: bool) -> Iterator[tuple[str, Any]]:
        seen = set()
        owners = self.named_modules(None, prefix, remove_duplicate) if recurse else [(prefix, self)]
        for path, module in owners:
            for name, tensor in module.__dict__[table].items():
                if tensor is None or id(tensor) in seen:
                    continue
                if remove_duplicate:
                    seen.add(id(tensor))
                yield f"{path}.{name}" if path else name, tensor

    def get_submodule(self, target: str) -> Module:
        """The module of that dotted name ("" is this one); AttributeError names the part that is missing."""
        module: Module = self
        for name in target.split(".") if target else ():
            found = module._modules.get(name)
            if found is None:
                known = ", ".join(module._modules) or "none"
                raise AttributeError(
                    f"{type(module).__name__} has no submodule {name!r} (of {target!r}); it has: {known}"
                )
            module = found
        return module

    def get_parameter(self, target: str) -> Parameter:
        """The parameter of that dotted name; AttributeError names what is missing."""
        path, _, name = target.rpartition(".")
        owner = self.get_submodule(path)
        found = owner._parameters.get(name)
        if found is None:
            known = ", ".join(owner._parameters) or "none"
            raise AttributeError(f"{type(owner).__name__} has no parameter {name!r} (of {target!r}); it has: {known}")
        return found

    def get_buffer(self, target: str) -> Tensor:
        """The buffer of that dotted name; AttributeError names what is missing."""
        path, _, name = target.rpartition(".")
        owner = self.get_submodule(path)
        found = owner._buffers.get(name)
        if found is None:
            known = ", ".join(owner._buffers) or "none"
            raise AttributeError(f"{type(owner).__name__} has no buffer {name!r} (of {target!r}); it has: {known}")
        return found

    # --- state ----------------------------------------------------------------------------------------------------

    def _state(self, prefix: str = "") -> Iterator[tuple[str, Tensor, bool]]:
        """(key, tensor, optional) of what the state dict holds, in PyTorch's order; a shared tensor under each name."""
        for name, parameter in self._parameters.items():
            if parameter is not None:
                yield prefix + name, parameter, False
        for name, buffer in self._buffers.items():
            if buffer is not None and name not in self._transient:
                yield prefix + name, buffer, name in self._optional_keys
        for name, child in self._modules.items():
            if child is not None:
                yield from child._state(f"{prefix}{name}.")

    def state_dict(self, prefix: str = "") -> OrderedDict[str, Tensor]:
        """Parameters and persistent buffers by dotted name, detached but not copied: later steps change them."""
        return OrderedDict((key, tensor.detach()) for key, tensor, _ in self._state(prefix))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> LoadResult:
        """Copy the values (Tensors or arrays) into this module, keeping its dtypes and devices.

        strict: every key of one side must be in the other. Raises StateDictError listing missing and unexpected keys
        and all shapes that differ; nothing is loaded then. Returns (missing_keys, unexpected_keys).
        """
        ours = {key: (tensor, optional) for key, tensor, optional in self._state()}
        missing = [key for key, (_, optional) in ours.items() if key not in state_dict and not optional]
        unexpected = [key for key in state_dict if key not in ours]
        problems = []
        if strict and missing:
            problems.append("missing keys: " + ", ".join(missing))
        if strict and unexpected:
            problems.append("unexpected keys: " + ", ".join(unexpected))
            if all(key.startswith("module.") for key in state_dict):
                problems.append("every key begins with 'module.' (saved from DataParallel): remove that prefix")
        arrays = {key: _as_array(value) for key, value in state_dict.items() if key in ours}
        for key, array in arrays.items():
            here = ours[key][0]
            if array.shape != here.shape:
                problems.append(f"{key}: shape {array.shape} in the state dict, {here.shape} in the module")
            elif array.dtype.kind == "c" and here.dtype.kind != "c":
                problems.append(f"{key}: {array.dtype} in the state dict, {here.dtype} in the module")
        if problems:
            raise StateDictError(f"state dict does not fit {type(self).__name__}:\n    " + "\n    ".join(problems))
        for key, array in arrays.items():
            tensor = ours[key][0]
            tensor.data = to_device(array, tensor.device)
        return LoadResult(missing, unexpected)

    # --- modes, devices, dtypes -----------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Set `training` here and below."""
        if not isinstance(mode, bool):
            raise ValueError(f"train(mode) needs True or False, not {mode!r}")
        if mode is not self.training:
            self.training = mode
        for child in self.children():  # through their own train(): a module may keep its batch norms frozen there
            child.train(mode)
        return self

    def eval(self) -> Self:
        """`train(False)`."""
        return self.train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set `requires_grad` of every parameter: False freezes them."""
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, or fill them with zeros."""
        clear_grads(self.parameters(), set_to_none)

    def apply(self, fn: Callable[[Module], Any]) -> Self:
        """Call `fn(module)` for all modules below, then for this one."""
        for child in self.children():
            child.apply(fn)
        fn(self)
        return self

    def to(self, *args: Any, device: Any = None, dtype: Any = None) -> Self:
        """Move parameters and buffers, in place, to a device and, the floating ones, to a floating dtype.

        Positional arguments may be a device ("cpu", "cuda:0", Device), a dtype, or a Tensor (its device and dtype).
        """
        for arg in args:
            if isinstance(arg, Tensor):
                device, dtype = arg.device, arg.dtype
            elif isinstance(arg, Device) or (isinstance(arg, str) and arg.partition(":")[0] in ("cpu", "cuda")):
                device = arg
            else:
                dtype = arg
        where, what = _as_device(device), None if dtype is None else np.dtype(dtype)
        if what is not None and what.kind not in "fcV":
            raise TypeError(f"Module.to takes floating dtypes, not {what}")

        def converted(tensor: Tensor) -> Any:
            array = tensor.array if where is None else to_device(tensor.array, where)
            return array.astype(what, copy=False) if what is not None and array.dtype.kind in "fcV" else array

        for tensor in [*self.parameters(), *self.buffers()]:
            tensor.array = converted(tensor)
            if tensor.grad is not None:
                tensor.grad.array = converted(tensor.grad)
        return self

    def float(self) -> Self:
        """`to(float32)`."""
        return self.to(dtype=np.float32)

    def double(self) -> Self:
        """`to(float64)`."""
        return self.to(dtype=np.float64)

    def half(self) -> Self:
        """`to(float16)`."""
        return self.to(dtype=np.float16)

    def cpu(self) -> Self:
        """`to("cpu")`."""
        return self.to("cpu")

    def cuda(self, index: int = 0) -> Self:
        """`to("cuda:index")`."""
        return self.to(f"cuda:{index}")

    # --- hooks ----------------------------------------------------------------------------------------------------

    def register_forward_pre_hook(self, hook: Callable[[Any, tuple], Any]) -> Handle:
        """Call `hook(module, args)` before forward; what it returns, if anything, replaces the positional arguments."""
        return self._hooked(self._forward_pre_hooks, hook)

    def register_forward_hook(self, hook: Callable[[Any, tuple, Any], Any]) -> Handle:
        """Call `hook(module, args, output)` after forward; what it returns, if anything, replaces the output."""
        return self._hooked(self._forward_hooks, hook)

    def register_full_backward_hook(self, hook: Callable[[Any, tuple, tuple], Any]) -> Handle:
        """Call `hook(module, grad_input, grad_output)` when the gradients of this module's inputs are known.

        Both are tuples of Tensors, None where there is no gradient; grad_input is that of the positional arguments.
        What the hook returns, if anything, replaces the gradient of the only input that has one.
        """
        return self._hooked(self._backward_hooks, hook)

    def _hooked(self, hooks: dict[int, Callable], hook: Callable) -> Handle:
        Module._changes += 1
        return Handle(hooks, hook)

    # --- text -----------------------------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        """What stands in the parentheses of `repr`; subclasses override it."""
        return ""

    def __repr__(self) -> str:
        extra = self.extra_repr()
        children = [f"({name}): " + repr(child).replace("\n", "\n  ") for name, child in self._modules.items()]
        if not children:
            return f"{type(self).__name__}({extra})"
        lines = ([extra] if extra else []) + children
        return f"{type(self).__name__}(\n  " + "\n  ".join(lines) + "\n)"


def clear_grads(parameters: Any, set_to_none: bool) -> None:
    """Set the gradients of `parameters` to None, or fill them with zeros."""
    for p in parameters:
        if set_to_none:
            p.grad = None
        elif p.grad is not None:
            p.grad.array = namespace_of(p.grad.array).zeros_like(p.grad.array)


def _as_array(value: Any) -> Any:
    """The array of a Tensor, or of whatever NumPy understands."""
    if isinstance(value, Tensor):
        return value.array
    return value if is_cuda_array(value) else np.asarray(value)


def _as_device(spec: Any) -> Device | None:
    return None if spec is None else device(spec)
