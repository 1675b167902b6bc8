"""Modules that hold modules: Sequential, ModuleList, ModuleDict. Children are named "0", "1", ... or by key."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

from .module import Module


def _position(index: int, length: int, kind: str) -> int:
    """A possibly negative index as one from 0 to length - 1."""
    if not -length <= index < length:
        raise IndexError(f"index {index} is out of range for a {kind} of {length} modules")
    return index % length


class _Ordered(Module):
    """What Sequential and ModuleList share: children in order, indexed by number."""

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._modules.values())

    def __getitem__(self, index: int | slice) -> Any:
        items = list(self._modules.items())
        if isinstance(index, slice):
            return self._of(items[index])
        return items[_position(index, len(items), type(self).__name__)][1]

    def __setitem__(self, index: int, module: Module) -> None:
        setattr(self, list(self._modules)[_position(index, len(self), type(self).__name__)], module)

    def __delitem__(self, index: int | slice) -> None:
        names = list(self._modules)
        gone = names[index] if isinstance(index, slice) else [names[_position(index, len(names), type(self).__name__)]]
        self._renumber([module for name, module in self._modules.items() if name not in gone])

    def _of(self, items: list[tuple[str, Module]]) -> Self:
        return type(self)(*[module for _, module in items])

    def _renumber(self, modules: list[Module]) -> None:
        self._modules.clear()
        for i, module in enumerate(modules):
            self.add_module(str(i), module)

    def append(self, module: Module) -> Self:
        """Add a module at the end and return the container."""
        self.add_module(str(len(self)), module)
        return self

    def extend(self, modules: Iterable[Module]) -> Self:
        """Add modules at the end and return the container."""
        for module in list(modules):
            self.append(module)
        return self

    def insert(self, index: int, module: Module) -> Self:
        """Add a module before position `index`; later ones move up by one name. Returns the container."""
        modules: list[Any] = list(self._modules.values())
        modules.insert(index, module)
        self._renumber(modules)
        return self


class Sequential(_Ordered):
    """Modules one after the other: `Sequential(a, b)(x) = b(a(x))`. Also takes one mapping of names to modules."""

    def __init__(self, *modules: Module | Mapping[str, Module]):
        super().__init__()
        named = modules[0].items() if len(modules) == 1 and isinstance(modules[0], Mapping) else None
        for name, module in named if named is not None else enumerate(modules):
            self.add_module(str(name), module)  # pyright: ignore[reportArgumentType]

    def _of(self, items: list[tuple[str, Module]]) -> Self:
        return type(self)(dict(items))

    def forward(self, x: Any) -> Any:
        """Each module applied to what the one before it returned."""
        for module in self:
            x = module(x)
        return x


class ModuleList(_Ordered):
    """A list whose modules are registered. It has no forward of its own."""

    def __init__(self, modules: Iterable[Module] = ()):
        super().__init__()
        self.extend(modules)

    def _of(self, items: list[tuple[str, Module]]) -> Self:
        return type(self)([module for _, module in items])


class ModuleDict(Module):
    """A dict whose modules are registered. It has no forward of its own."""

    def __init__(self, modules: Mapping[str, Module] | None = None):
        super().__init__()
        self.update(modules or {})

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __getitem__(self, name: str) -> Any:
        return self._modules[name]

    def __setitem__(self, name: str, module: Module) -> None:
        self.add_module(name, module)

    def __delitem__(self, name: str) -> None:
        delattr(self, name)

    def keys(self) -> Iterable[str]:
        """The names."""
        return self._modules.keys()

    def values(self) -> Iterable[Any]:
        """The modules."""
        return self._modules.values()

    def items(self) -> Iterable[tuple[str, Any]]:
        """(name, module) pairs."""
        return self._modules.items()

    def update(self, modules: Mapping[str, Module]) -> None:
        """Add or replace several."""
        for name, module in modules.items():
            self.add_module(name, module)
