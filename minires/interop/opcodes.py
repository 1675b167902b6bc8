"""What a pickle says, without doing it: an interpreter for the few opcodes that PyTorch's state dicts are written in.

A pickle is a program for a stack machine, and `pickle.load` runs it: it imports what the program names and calls it.
Here nothing is imported and nothing is called. A name is looked up in NAMES, the whole list of what may be named, and
becomes a `Name`: a text. "Calling" one of them is a branch of `call_*` below, which builds an OrderedDict, a tuple, a
text, or asks `rebuild` for a tensor. Every other opcode, name or use of a name is refused, and there is no fallback.

Opcodes: Python's `pickletools`. What PyTorch writes: its `torch/serialization.py` and `torch/_utils.py`.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from .refusal import Cursor

MOST_OPCODES = 1 << 20  # read in about a second; enough for 20,000 tensors
_LONGEST_INTEGER = 16  # bytes
_LONGEST_KEY = 64  # letters
_MOST_DIMENSIONS = 64  # NumPy's limit


class Name(str):
    """The name of something in PyTorch ("torch.float32"): only a text."""


class Storage(NamedTuple):
    """Where values lie. key: its name in the file; dtype: the Name of its class; numel: how many elements it claims;
    start, claimed by a view of another storage: its first element in that one; at: the byte that says all this."""

    key: str
    dtype: Name
    numel: int
    start: int
    whole: int
    at: int


STORAGES = tuple(
    f"torch.{kind}Storage"
    for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
)
UNTYPED = "torch.storage.UntypedStorage"
DTYPES = tuple(
    f"torch.{kind}"
    for kind in "float32 float64 float16 bfloat16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool".split()
)
NAMES = frozenset(
    (
        "collections.OrderedDict",
        "torch.Size",
        "torch.device",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        UNTYPED,
        *STORAGES,
        *DTYPES,
    )
)

# rebuild(storage, first element, shape, strides in elements, dtype or None for the storage's, byte) -> a tensor
Rebuild = Callable[[Storage, int, tuple[int, ...], tuple[int, ...], Name | None, int], Any]
_MARK = object()


class Interpreter:
    """Reads one pickle at the cursor: `Interpreter(cursor, rebuild, tensor_class).run()` returns what it describes.

    Values are None, bool, int, float, str, tuple, list, dict, OrderedDict, `Name`, `Storage` and what rebuild returns.
    Raises CheckpointError with the reason and the byte.
    """

    def __init__(self, cursor: Cursor, rebuild: Rebuild, tensor_class: type):
        self.cursor, self.rebuild, self.tensor_class = cursor, rebuild, tensor_class
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.pairs = 0  # of all OrderedDicts
        self.at = cursor.at  # of the opcode that is being read

    def run(self) -> Any:
        cursor = self.cursor
        if bytes(cursor.take(1)) != b"\x80" or not 2 <= cursor.number(1) <= 5:
            cursor.refuse("no pickle of protocol 2 to 5 begins here", self.at)
        for _ in range(MOST_OPCODES):
            self.at = cursor.at
            code = cursor.number(1)
            if code == _STOP:
                if self.marks or len(self.stack) != 1:
                    self.refuse("the pickle does not end with one value")
                return self.stack[0]
            step = _STEPS.get(code)
            if step is None:
                self.refuse(f"opcode {_shown(code)} is not one that state dicts are written in")
            step(self)
        self.refuse(f"the pickle has more than {MOST_OPCODES:,} opcodes")

    def refuse(self, why: str) -> NoReturn:
        self.cursor.refuse(why, self.at)

    # --- the stack ------------------------------------------------------------------------------------------------

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            self.refuse("a value is taken from an empty stack")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            self.refuse("there is no mark")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def top(self, kinds: tuple[type, ...], what: str) -> Any:
        """The value on top, which stays there and must be exactly of one of the kinds: subclasses are refused."""
        value = self.pop()
        if type(value) not in kinds:
            self.refuse(f"{what} is a {type(value).__name__}")
        self.push(value)
        return value

    def put(self, index: int) -> None:
        if index > len(self.memo):
            self.refuse(f"memo entry {index} follows entry {len(self.memo) - 1}")
        value = self.pop()
        self.push(value)
        self.memo[index] = value

    def get(self, index: int) -> None:
        if index not in self.memo:
            self.refuse(f"memo entry {index} is read before it is written")
        self.push(self.memo[index])

    # --- containers -----------------------------------------------------------------------------------------------

    def tuple_of(self, n: int) -> None:
        self.push(tuple(reversed([self.pop() for _ in range(n)])))

    def set_items(self, pairs: list[Any]) -> None:
        target = self.top((dict, OrderedDict), "what gets items")
        if len(pairs) % 2:
            self.refuse("a key has no value")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            target[self.checked_key(key)] = value

    def checked_key(self, key: Any) -> Any:
        """Texts and integers of 64 bits: values that nobody can choose so that all fall in one slot of a dict."""
        if type(key) is not str and not (type(key) is int and -(2**63) <= key < 2**64):
            self.refuse(f"a key is a {type(key).__name__}, not a text or an integer")
        return key

    def append_items(self, values: list[Any]) -> None:
        self.top((list,), "what is appended to").extend(values)

    # --- names and what they build --------------------------------------------------------------------------------

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            self.refuse("a name that is no text")
        full = f"{module}.{name}"
        if full not in NAMES or "." in name:
            self.refuse(
                f"it asks for {full[:80]!r}, which no state dict needs; nothing was run. "
                "In PyTorch: torch.save(model.state_dict(), ...)"
            )
        self.push(Name(full))

    def reduce(self) -> None:
        arguments, name = self.pop(), self.pop()
        if type(name) is not Name or type(arguments) is not tuple:
            self.refuse("something other than a known name is called")
        build = _CALLS.get(name)
        if build is None:
            self.refuse(f"{name} is called")
        self.push(build(self, arguments))

    def call_ordered_dict(self, arguments: tuple) -> OrderedDict:
        pairs = arguments[0] if len(arguments) == 1 else []
        if len(arguments) > 1 or type(pairs) is not list:
            self.refuse("an OrderedDict of what is no list")
        self.pairs += len(pairs)
        if self.pairs > MOST_OPCODES:  # one long list, used again and again
            self.refuse(f"OrderedDicts of more than {MOST_OPCODES:,} pairs")
        found: OrderedDict = OrderedDict()
        for pair in pairs:
            if type(pair) not in (list, tuple) or len(pair) != 2:
                self.refuse("an OrderedDict of what are no pairs")
            found[self.checked_key(pair[0])] = pair[1]
        return found

    def call_size(self, arguments: tuple) -> tuple:
        return self.integers(arguments[0]) if len(arguments) == 1 else self.refuse("a Size of what is no tuple")

    def call_device(self, arguments: tuple) -> str:
        if not 1 <= len(arguments) <= 2 or [type(a) for a in arguments] != [str, int][: len(arguments)]:
            self.refuse("a device that is no text and number")
        return ":".join(map(str, arguments))

    def call_tensor(self, arguments: tuple) -> Any:
        """_rebuild_tensor(storage, offset, size, stride); _v2 adds (requires_grad, hooks[, metadata]); _v3 puts the
        dtype between hooks and metadata."""
        if len(arguments) not in (4, 6, 7, 8):
            self.refuse(f"a tensor with {len(arguments)} arguments")
        storage, offset, size, stride, _, hooks, *rest = arguments if len(arguments) > 4 else (*arguments, None, None)
        dtype = rest.pop(0) if rest and type(rest[0]) is Name else None
        if type(storage) is not Storage or type(offset) is not int or not all(map(_is_nothing, [hooks, *rest])):
            self.refuse("a tensor with arguments that no state dict has")
        if (dtype is None) == (storage.dtype == UNTYPED) or not (dtype is None or dtype in DTYPES):
            self.refuse("a tensor whose dtype does not fit its storage")
        return self.rebuild(storage, offset, self.integers(size), self.integers(stride), dtype, self.at)

    def call_parameter(self, arguments: tuple) -> Any:
        """_rebuild_parameter(tensor, requires_grad, hooks): the tensor."""
        if len(arguments) != 3 or type(arguments[0]) is not self.tensor_class or not _is_nothing(arguments[2]):
            self.refuse("a parameter with arguments that no state dict has")
        return arguments[0]

    def integers(self, values: Any) -> tuple[int, ...]:
        if type(values) is not tuple or len(values) > _MOST_DIMENSIONS or any(type(v) is not int for v in values):
            self.refuse(f"a size or stride that is no tuple of at most {_MOST_DIMENSIONS} integers")
        return values

    def storage(self) -> None:
        """('storage', class, key, device, elements[, view]); a view is None or (key, first element, elements)."""
        said = self.pop()
        if type(said) is not tuple or not 5 <= len(said) <= 6 or [type(s) for s in said[:2]] != [str, Name]:
            self.refuse("a persistent id that is no storage")
        word, dtype, key, _, numel, *view = said
        if word != "storage":
            self.refuse(f"a persistent id of a {word[:40]!r}, not of a storage")
        if dtype not in (*STORAGES, UNTYPED) or type(key) is not str or type(numel) is not int or numel < 0:
            self.refuse("a storage of what is no class, key and number of elements")
        if len(key) > _LONGEST_KEY:
            self.refuse(f"a storage whose key has {len(key)} letters")
        start, whole = 0, numel
        if view and view[0] is not None:
            if dtype == UNTYPED:
                self.refuse("a view of an untyped storage")
            start, numel = self.view(view[0], whole)
        self.push(Storage(key, Name(dtype), numel, start, whole, self.at))

    def view(self, view: Any, whole: int) -> tuple[int, int]:
        """(first element, elements) of a storage that is a part of another."""
        if type(view) is not tuple or len(view) != 3:
            self.refuse("a view of a storage that is no tuple of three")
        _, start, numel = view
        if type(start) is not int or type(numel) is not int or not 0 <= start <= start + numel <= whole:
            self.refuse(f"a view of a storage from {start} on, {numel} elements, where there are {whole}")
        return start, numel

    def build(self) -> None:
        """State is given to an object. Only OrderedDicts get some, PyTorch's `_metadata`, which has no use here."""
        state = self.pop()
        self.top((OrderedDict,), "what gets a state")
        if type(state) is not dict:
            self.refuse("a state that is no dict")


def _is_nothing(value: Any) -> bool:
    """Whether it is None or an empty dict: PyTorch's hooks and metadata of plain tensors."""
    return value is None or (type(value) in (dict, OrderedDict) and not value)


def _shown(code: int) -> str:
    return f"0x{code:02x}" + (f" ({chr(code)!r})" if 32 < code < 127 else "")


_STOP = ord(".")
_CALLS: dict[str, Callable[[Interpreter, tuple], Any]] = {
    "collections.OrderedDict": Interpreter.call_ordered_dict,
    "torch.Size": Interpreter.call_size,
    "torch.device": Interpreter.call_device,
    "torch._utils._rebuild_parameter": Interpreter.call_parameter,
    "torch._utils._rebuild_tensor": Interpreter.call_tensor,
    "torch._utils._rebuild_tensor_v2": Interpreter.call_tensor,
    "torch._utils._rebuild_tensor_v3": Interpreter.call_tensor,
}


def _integer(machine: Interpreter) -> None:
    n = machine.cursor.number(1)
    if n > _LONGEST_INTEGER:
        machine.refuse(f"an integer of {n} bytes")
    machine.push(machine.cursor.number(n, signed=True))


def _global(machine: Interpreter) -> None:
    module = machine.cursor.line()
    machine.name(module, machine.cursor.line())


def _stack_global(machine: Interpreter) -> None:
    name, module = machine.pop(), machine.pop()
    machine.name(module, name)


def _set_item(machine: Interpreter) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


_STEPS: dict[int, Callable[[Interpreter], Any]] = {
    ord("("): lambda m: m.marks.append(len(m.stack)),
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("K"): lambda m: m.push(m.cursor.number(1)),
    ord("M"): lambda m: m.push(m.cursor.number(2)),
    ord("J"): lambda m: m.push(m.cursor.number(4, signed=True)),
    0x8A: _integer,
    ord("G"): lambda m: m.push(struct.unpack(">d", m.cursor.take(8))[0]),
    ord("U"): lambda m: m.push(m.cursor.text(m.cursor.number(1))),  # Python 2's str
    0x8C: lambda m: m.push(m.cursor.text(m.cursor.number(1))),
    ord("X"): lambda m: m.push(m.cursor.text(m.cursor.number(4))),
    0x8D: lambda m: m.push(m.cursor.text(m.cursor.number(8))),
    ord("}"): lambda m: m.push({}),
    ord("]"): lambda m: m.push([]),
    ord(")"): lambda m: m.push(()),
    ord("t"): lambda m: m.push(tuple(m.pop_to_mark())),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    ord("s"): _set_item,
    ord("u"): lambda m: m.set_items(m.pop_to_mark()),
    ord("a"): lambda m: m.append_items([m.pop()]),
    ord("e"): lambda m: m.append_items(m.pop_to_mark()),
    ord("q"): lambda m: m.put(m.cursor.number(1)),
    ord("r"): lambda m: m.put(m.cursor.number(4)),
    0x94: lambda m: m.put(len(m.memo)),
    ord("h"): lambda m: m.get(m.cursor.number(1)),
    ord("j"): lambda m: m.get(m.cursor.number(4)),
    0x95: lambda m: m.cursor.number(8),  # the length of a frame: of no use where all bytes are at hand
    ord("c"): _global,
    0x93: _stack_global,
    ord("R"): Interpreter.reduce,
    ord("Q"): Interpreter.storage,
    ord("b"): Interpreter.build,
}
