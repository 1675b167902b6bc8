"""Optimizer: parameter groups, state per parameter, and the loop over them. Each method has a page with its formula."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..cuda import is_current_stream_capturing
from ..device import is_cuda_array, namespace_of, to_device
from ..engine import Tensor, set_grad_enabled
from ..nn.module import clear_grads


class Optimizer:
    """Base class. Subclasses define `update` (one parameter, in place) and `check` (a group's settings).

    params: an iterable of tensors that require gradients, or of dicts {"params": [...], "lr": ...} that override
    `defaults` for a group of them. `param_groups` is the list of these dicts, `state` maps a parameter to what is
    remembered about it (Tensors). Raises ValueError for an empty list, a parameter given twice, one that is not a leaf.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]):
        if isinstance(params, (Tensor, dict)):
            raise TypeError(
                f"params must be an iterable of tensors or dicts, not a {type(params).__name__}; use a list"
            )
        self.defaults = defaults
        self.state: dict[Tensor, dict[str, Any]] = {}
        self.param_groups: list[dict[str, Any]] = []
        groups = list(params)
        if not groups:
            raise ValueError("optimizer got an empty parameter list")
        if not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        for group in groups:
            self.add_param_group(group)

    def check(self, group: dict[str, Any]) -> None:
        """Raise ValueError where a setting of the group makes no sense."""

    def update(self, p: Any, g: Any, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Change the array `p` in place, given its gradient `g`; `state` is what the last update left there."""
        raise NotImplementedError

    def update_group(self, params: list[Any], group: dict[str, Any], found: Any = None) -> None:
        """`update` for each of a group's parameters, which have gradients; nothing where `found` is not 0, see `step`.
        Overridden where a kernel takes them all."""
        for p in params if found is None or float(found[0]) == 0 else ():
            self.update(p.array, p.grad.array, self.state.setdefault(p, {}), group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group {"params": tensors, setting: value, ...}; settings that it lacks come from `defaults`."""
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f"a parameter group must be a dict with 'params', not {type(param_group).__name__}")
        unknown = sorted(set(param_group) - set(self.defaults) - {"params", "initial_lr", "name"})
        if unknown:
            known = ", ".join(self.defaults)
            raise ValueError(f"{type(self).__name__} has no setting {', '.join(map(repr, unknown))}; it has: {known}")
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        taken = {id(p) for group in self.param_groups for p in group["params"]}
        for i, p in enumerate(params):
            if not isinstance(p, Tensor):
                raise TypeError(f"optimizers take tensors, but parameter {i} of the group is a {type(p).__name__}")
            if not p.is_leaf:
                raise ValueError(
                    f"parameter {i} of the group, of shape {p.shape}, is computed: only leaves can be optimized"
                )
            if id(p) in taken:
                raise ValueError(f"parameter {i} of the group, of shape {p.shape}, is in the optimizer already")
            taken.add(id(p))
        group = {"params": params, **self.defaults, **{k: v for k, v in param_group.items() if k != "params"}}
        self.check(group)
        self.param_groups.append(group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, or fill them with zeros."""
        clear_grads(self._params(), set_to_none)

    def step(self, closure: Callable[[], Any] | None = None, *, found: Any = None) -> Any:
        """Change every parameter that has a gradient. closure: computes loss and gradients; its value is returned.

        found: an array (1,), float32, on the parameters' device: where it is not 0 (a gradient is NaN or infinite),
        parameters and what is remembered about them stay as they are, and the host need not look for that, so that a
        CUDA graph can hold it. AdamW counts such a step all the same: `counts`.
        """
        loss = None
        if closure is not None:
            with set_grad_enabled(True):
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            self.update_group(params, self.settings(group), found)
            for p in params:
                p.version[0] += 1
        return loss

    def counts(self) -> list[tuple[dict[str, Any], Any]]:
        """The numbers of steps made, for `set_counts` after a step that `found` left out."""
        return [(kept, kept["step"]) for kept in self.state.values() if "step" in kept]

    def set_counts(self, counts: list[tuple[dict[str, Any], Any]]) -> None:
        """Put numbers of steps back to what they were."""
        for kept, count in counts:
            kept["step"] = count

    def settings(self, group: dict[str, Any]) -> dict[str, Any]:
        """The group as `update` gets it, once per step. RuntimeError where a CUDA graph would keep its numbers."""
        if is_current_stream_capturing() and not group.get("capturable"):
            remedy = "make it with capturable=True" if "capturable" in self.defaults else "SGD and AdamW can do without"
            raise RuntimeError(
                f"{type(self).__name__} has numbers of the host, which a CUDA graph cannot ask: {remedy}"
            )
        return group

    def state_dict(self) -> dict[str, Any]:
        """{"state": {i: {name: Tensor or number}}, "param_groups": [...]}, parameters numbered in order of the groups.

        As in PyTorch. The Tensors are the optimizer's own, not copies.
        """
        numbers = {id(p): i for i, p in enumerate(self._params())}
        groups = [{**group, "params": [numbers[id(p)] for p in group["params"]]} for group in self.param_groups]
        return {"state": {numbers[id(p)]: dict(kept) for p, kept in self.state.items()}, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over settings and state, copied, from a `state_dict` of an optimizer over the same parameters.

        Raises ValueError, and changes nothing, where groups or shapes do not fit.
        """
        groups, params = state_dict["param_groups"], self._params()
        there, here = [len(g["params"]) for g in groups], [len(g["params"]) for g in self.param_groups]
        if there != here:
            raise ValueError(f"the state dict has groups of {there} parameters, this optimizer of {here}")
        by_number = dict(zip((i for g in groups for i in g["params"]), params, strict=True))
        state: dict[Tensor, dict[str, Any]] = {}
        for i, kept in state_dict["state"].items():
            p = by_number[int(i)]
            for name, value in kept.items():
                if isinstance(value, Tensor) and value.shape not in ((), p.shape):
                    raise ValueError(f"{name} of parameter {i} has shape {value.shape}, the parameter {p.shape}")
            state[p] = {name: _kept(name, value, p) for name, value in kept.items()}
        for group, new in zip(self.param_groups, groups, strict=True):
            self.check({**group, **new})
        for group, new in zip(self.param_groups, groups, strict=True):
            group.update({name: value for name, value in new.items() if name not in ("params", "capturable")})
        self.state = state

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def __repr__(self) -> str:
        lines = [type(self).__name__ + " ("]
        for i, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {i}")
            lines += [f"    {name}: {value}" for name, value in sorted(group.items()) if name != "params"]
        return "\n".join([*lines, ")"])


def _kept(name: str, value: Any, p: Tensor) -> Any:
    """A loaded piece of state: a number as it is (PyTorch keeps `step` in a tensor), else a copy that suits `p`."""
    if not isinstance(value, Tensor):
        return value
    if name == "step":
        return int(value.array)
    return Tensor(to_device(value.array, p.device).astype(p.dtype, copy=True))


def alike(params: list[Any], key: Callable[[Any], Any]) -> list[list[Any]]:
    """The parameters that one kernel can serve together: those of one device, dtype and `key`, in their order."""
    found: dict[Any, list[Any]] = {}
    for p in params:
        found.setdefault((p.device, p.array.dtype, key(p)), []).append(p)
    return list(found.values())


def computed_in(dtype: Any) -> Any:
    """The dtype of a learning rate for parameters of this one: float32 for those of 16 bits, else the same."""
    return "float32" if dtype.itemsize == 2 else dtype


def kept_array(state: dict[str, Any], name: str, p: Any) -> Any:
    """The array that `state` keeps under `name`; zeros like `p` the first time. RuntimeError for that in a capture:
    every replay would begin with zeros."""
    if name not in state:
        if is_cuda_array(p) and is_current_stream_capturing():
            raise RuntimeError("the optimizer has not made a step with every parameter yet: make one, then capture")
        state[name] = Tensor(namespace_of(p).zeros_like(p))
    return state[name].array


def check_at_least_zero(group: dict[str, Any], *names: str) -> None:
    """ValueError where one of these settings is negative or not a number."""
    for name in names:
        if not group[name] >= 0:
            raise ValueError(f"{name}={group[name]!r} must be at least 0")
