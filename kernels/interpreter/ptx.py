"""PTX text to a small instruction form: modules, functions, variables, instructions and their operands.

Covers what NVRTC and nvcc emit and what inline assembly of kernels contains. Source: PTX ISA, "Syntax" and "State
Spaces, Types, and Variables" (docs.nvidia.com/cuda/parallel-thread-execution).
"""

from __future__ import annotations

import functools
import re
import struct
from dataclasses import dataclass, field
from typing import NamedTuple

SIZES = {"pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2}
SIZES |= dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2", "tf32"), 4)
SIZES |= dict.fromkeys(("b64", "u64", "s64", "f64"), 8) | {"b128": 16}

_TOKEN = re.compile(
    r"""(?P<space>\s+) | (?P<string>"[^"]*")
      | (?P<number>0[fF][0-9a-fA-F]{8}\b | 0[dD][0-9a-fA-F]{16}\b | 0[xX][0-9a-fA-F]+U?
          | \d+\.\d*(?:[eE][+-]?\d+)? | \d+U?)
      | (?P<name>[.%$A-Za-z_][\w$]*(?:(?:\.|::)[\w$]+)*)
      | (?P<mark>[][{}()<>;:,=|@!+\-])""",
    re.VERBOSE,
)
_SPECIAL = re.compile(  # "Special Registers"
    r"%(n?tid|n?ctaid|n?warpid|laneid|n?smid|gridid|lanemask|clock|pm\d|envreg|global|n?cluster|is_explicit|\w+_smem)"
)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


class Register(NamedTuple):
    """A register of the function: its place in the register file and its declared type."""

    name: str
    index: int
    type: str


class Immediate(NamedTuple):
    """A number in the text. A float is the one that its bits mean."""

    value: int | float


class Special(NamedTuple):
    """A special register such as %tid.x, or the sink `_`."""

    name: str


class Symbol(NamedTuple):
    """The address of a variable or of a parameter."""

    name: str


class Target(NamedTuple):
    """A label that an instruction jumps to."""

    name: str


class Vector(NamedTuple):
    """{a, b, ...}; also the pair a|b of instructions with two results."""

    items: tuple


class Negated(NamedTuple):
    """!p: a predicate read the other way round."""

    register: Register


class Address(NamedTuple):
    """[base + offset], and the coordinates of a tensor: [base, {x, y}]."""

    base: Register | Symbol | Immediate
    offset: int
    coordinates: tuple


Operand = Register | Negated | Immediate | Special | Symbol | Target | Vector | Address


class Loc(NamedTuple):
    """A line of the CUDA source (`-lineinfo`): the number of its file in the module, and the line. outer: where that
    was inlined, or None."""

    file: int
    line: int
    outer: tuple[int, int] | None


@dataclass(frozen=True, eq=False)
class Instruction:
    """One instruction. modifiers: what follows the opcode, dots taken off. guard: (predicate, negated) or None. line:
    of the PTX text. loc: of the CUDA source, or None. text: as written."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: tuple[Register, bool] | None
    line: int
    loc: Loc | None
    text: str


@dataclass(frozen=True)
class Variable:
    """A variable of the module, of a function, or a parameter. size: in bytes; 0 for `extern .shared x[]`. offset:
    of a parameter, in the parameter buffer. initial: its bytes, where the text gives some."""

    name: str
    space: str
    type: str
    align: int
    size: int
    initial: bytes = b""
    offset: int = 0


@dataclass(eq=False)
class Function:
    """A kernel (`.entry`). registers, register_names: the declared type and the name
    of each. labels: name to index of an instruction. limits:
    .maxntid and the like."""

    name: str
    parameters: list[Variable] = field(default_factory=list)
    registers: list[str] = field(default_factory=list)
    register_names: list[str] = field(default_factory=list)
    variables: dict[str, Variable] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    limits: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(eq=False)
class Module:
    """A parsed PTX text. files: names of the source files, by number."""

    target: str
    functions: dict[str, Function]
    variables: dict[str, Variable]
    files: dict[int, str]

    def function(self, name: str) -> Function:
        """The kernel of that name; KeyError with the known names where there is none."""
        if name not in self.functions:
            raise KeyError(f"the module has no kernel {name!r}; it has {', '.join(self.functions) or 'none'}")
        return self.functions[name]

    def where(self, instruction: Instruction) -> str:
        """The source line of an instruction, `file:line` (and where that was inlined), or its line of the PTX text."""
        loc = instruction.loc
        if loc is None or loc.line == 0:
            return f"PTX line {instruction.line}"
        outer = "" if loc.outer is None else f", inlined at {self._line(*loc.outer)}"
        return self._line(loc.file, loc.line) + outer

    def _line(self, file: int, line: int) -> str:
        return f"{self.files.get(file, '?').rpartition('/')[2]}:{line}"


@functools.lru_cache(maxsize=256)
def parse(text: str) -> Module:
    """Parse a PTX module. SyntaxError naming the line where the text is not what we know PTX to be."""
    return _Parser(text).module()


class _Parser:
    def __init__(self, text: str):
        text = _COMMENT.sub(lambda m: "\n" * m[0].count("\n"), text.rstrip("\0"))
        self.kinds, self.tokens, self.lines = _tokenize(text)
        self.at = 0
        self.result = Module("", {}, {}, {})

    def module(self) -> Module:
        while self.at < len(self.tokens):
            token = self.next()
            if token == ".version" or token == ".address_size":
                self.next()
            elif token == ".target":
                self.result.target = self.next()
                while self.accept(","):
                    self.next()
            elif token == ".file":
                number = int(self.next())
                self.result.files[number] = self.next().strip('"')
                while self.accept(","):
                    self.next()
            elif token == ".section":
                self.skip_braces()
            elif token == ".entry":
                _FunctionParser(self).read()
            elif token in (".global", ".const", ".shared"):
                variable = self.variable(token[1:])
                self.result.variables[variable.name] = variable
            elif token == ".func":
                raise NotImplementedError(f"line {self.line()}: device functions that are called; inline them")
            elif token not in (".visible", ".extern", ".weak", ".common", ";"):
                raise SyntaxError(f"line {self.line()}: unexpected {token!r}")
        return self.result

    def line(self) -> int:
        """The line of the token read last."""
        return self.lines[max(0, min(self.at, len(self.lines)) - 1)]

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def next(self) -> str:
        token = self.peek()
        self.at += 1
        return token

    def accept(self, token: str) -> bool:
        if self.peek() == token:
            self.at += 1
            return True
        return False

    def expect(self, token: str) -> None:
        if not self.accept(token):
            raise SyntaxError(f"line {self.lines[min(self.at, len(self.lines) - 1)]}: {self.peek()!r} for {token!r}")

    def integer(self) -> int:
        sign = -1 if self.accept("-") else 1
        return sign * int(self.next().rstrip("U"), 0)

    def skip_braces(self) -> None:
        while self.next() != "{":
            pass
        depth = 1
        while depth:
            depth += {"{": 1, "}": -1}.get(self.next(), 0)

    def variable(self, space: str) -> Variable:
        """A declaration, from after its state space: alignment, type, name, dimensions, initial value."""
        align, kind, lanes = 0, "", 1
        while self.peek().startswith("."):
            token = self.next()[1:]
            if token == "align":
                align = self.integer()
            elif token in ("v2", "v4"):
                lanes = int(token[1:])
            elif token in SIZES:
                kind = token
            elif token == "ptr":  # a hint: .ptr .global .align 16
                while self.peek().startswith("."):
                    if self.next() == ".align":
                        self.integer()
            else:
                raise NotImplementedError(f"line {self.line()}: .{token} in a declaration")
        name, size = self.next(), SIZES[kind] * lanes
        while self.accept("["):
            size *= 0 if self.peek() == "]" else self.integer()
            self.expect("]")
        initial = self.initial(kind) if self.accept("=") else b""
        self.accept(";")
        return Variable(name, space, kind, align or SIZES[kind] * lanes, size, initial)

    def initial(self, kind: str) -> bytes:
        values, depth = [], 0
        while self.peek() != ";":
            token = self.peek()
            if token in "{},":
                depth += {"{": 1, "}": -1}.get(self.next(), 0)
            else:
                values.append(self.immediate())
        codes = {1: "B", 2: "H", 4: "I", 8: "Q"}
        if kind in ("f32", "f64"):
            return b"".join(struct.pack("<f" if kind == "f32" else "<d", v) for v in values)
        size = SIZES[kind]
        return b"".join(struct.pack("<" + codes[size], int(v) & (1 << 8 * size) - 1) for v in values)

    def immediate(self) -> int | float:
        sign = -1 if self.accept("-") else 1
        if self.peek() == "" or self.kinds[self.at] != "number":
            raise NotImplementedError(f"line {self.line()}: {self.peek()!r} where a number is expected")
        token = self.next()
        if token[:2] in ("0f", "0F"):
            return struct.unpack(">f", bytes.fromhex(token[2:]))[0]
        if token[:2] in ("0d", "0D"):
            return struct.unpack(">d", bytes.fromhex(token[2:]))[0]
        return sign * (float(token) if "." in token else int(token.rstrip("U"), 0))


class _FunctionParser:
    """Reads one kernel. Names live in scopes: every `{ }` of inline assembly may declare its own."""

    def __init__(self, parser: _Parser):
        self.p = parser
        self.function = Function(parser.next())
        self.scopes: list[dict[str, Register | Target]] = [{}]
        self.loc: Loc | None = None
        self.unique = 0

    def read(self) -> None:
        p, f = self.p, self.function
        offset = 0
        if p.accept("("):
            while not p.accept(")"):
                p.expect(".param")
                v = p.variable("param")
                offset = -(-offset // v.align) * v.align
                f.parameters.append(Variable(v.name, "param", v.type, v.align, v.size, b"", offset))
                offset += v.size
                p.accept(",")
        while p.peek() != "{":
            name, values = p.next()[1:], []
            while p.kinds[p.at] == "number":
                values.append(p.integer())
                p.accept(",")
            f.limits[name] = tuple(values)
        p.expect("{")
        self.declare_labels()
        while self.scopes:
            self.statement()
        self.p.result.functions[f.name] = f

    def declare_labels(self) -> None:
        """Note the labels of the scope that begins here: a jump may stand before the label it goes to."""
        p, depth, at = self.p, 0, self.p.at
        while depth >= 0:
            token = p.tokens[at]
            depth += {"{": 1, "}": -1}.get(token, 0)
            if depth == 0 and p.tokens[at + 1] == ":" and p.kinds[at] == "name":
                self.unique += 1
                self.scopes[-1][token] = Target(token if len(self.scopes) == 1 else f"{token}#{self.unique}")
            at += 1

    def statement(self) -> None:
        p = self.p
        token = p.peek()
        if token == "{":
            p.next()
            self.scopes.append({})
            self.declare_labels()
        elif token == "}":
            p.next()
            self.scopes.pop()
        elif token == ";":
            p.next()
        elif token.startswith("."):
            self.directive(p.next())
        elif p.tokens[p.at + 1] == ":":
            self.label()
        else:
            self.instruction()

    def label(self) -> None:
        p = self.p
        name = self.lookup(p.next())
        assert isinstance(name, Target)
        p.expect(":")
        if p.peek() == ".branchtargets":
            raise NotImplementedError(f"line {p.line()}: {p.peek()}, the targets of an indirect branch")
        self.function.labels[name.name] = len(self.function.instructions)

    def directive(self, token: str) -> None:
        p = self.p
        if token == ".reg":
            kind = p.next()[1:]
            if kind not in SIZES:
                raise NotImplementedError(f"line {p.line()}: registers of type .{kind}")
            while not p.accept(";"):
                self.registers(p.next(), kind)
                p.accept(",")
        elif token in (".shared", ".local"):
            variable = p.variable(token[1:])
            self.function.variables[variable.name] = variable
        elif token == ".loc":
            file, line, _ = p.integer(), p.integer(), p.integer()
            outer = None
            while p.accept(","):  # function_name LABEL, inlined_at FILE LINE COLUMN
                if p.next() == "function_name":
                    p.next()
                    while p.accept("+"):
                        p.integer()
                else:
                    outer = (p.integer(), p.integer())
                    p.integer()
            self.loc = Loc(file, line, outer)
        elif token == ".pragma":
            p.next()
        else:
            raise NotImplementedError(f"line {p.line()}: directive {token}")

    def registers(self, name: str, kind: str) -> None:
        names = [name]
        if self.p.accept("<"):
            names = [f"{name}{i}" for i in range(self.p.integer())]
            self.p.expect(">")
        for each in names:
            self.scopes[-1][each] = Register(each, len(self.function.registers), kind)
            self.function.registers.append(kind)
            self.function.register_names.append(each)

    def lookup(self, name: str) -> Operand:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        known = self.function.variables.keys() | self.p.result.variables.keys()
        if name in known or any(name == v.name for v in self.function.parameters):
            return Symbol(name)
        if name == "_" or _SPECIAL.match(name):
            return Special(name)
        raise SyntaxError(f"line {self.p.line()}: {name!r} is not declared")

    def instruction(self) -> None:
        p, begin, guard = self.p, self.p.at, None
        if p.accept("@"):
            negated = p.accept("!")
            predicate = self.lookup(p.next())
            assert isinstance(predicate, Register)
            guard = (predicate, negated)
        line = p.lines[p.at]
        opcode, *modifiers = p.next().split(".")
        if opcode == "call":
            raise NotImplementedError(f"line {line}: device functions that are called; inline them")
        operands = []
        while not p.accept(";"):
            operands.append(self.operand())
            p.accept(",")
        text = _spaced(p.tokens[begin : p.at - 1])
        self.function.instructions.append(
            Instruction(opcode, tuple(modifiers), tuple(operands), guard, line, self.loc, text)
        )

    def operand(self) -> Operand:
        p = self.p
        if p.accept("["):
            return self.address()
        if p.accept("{"):
            items = []
            while not p.accept("}"):
                items.append(self.operand())
                p.accept(",")
            return Vector(tuple(items))
        if p.kinds[p.at] == "number" or p.peek() == "-":
            return Immediate(p.immediate())
        if p.accept("!"):
            register = self.lookup(p.next())
            assert isinstance(register, Register)
            return Negated(register)
        first = self.lookup(p.next())
        if p.accept("|"):
            return Vector((first, self.lookup(p.next())))
        if isinstance(first, Symbol) and p.peek() in ("+", "-"):
            return Address(first, self.offset(), ())
        return first

    def offset(self) -> int:
        return self.p.integer() if self.p.accept("+") or self.p.peek() == "-" else 0

    def address(self) -> Address:
        p = self.p
        base = Immediate(p.integer()) if p.kinds[p.at] == "number" else self.lookup(p.next())
        assert isinstance(base, (Register, Symbol, Immediate))
        offset, coordinates = self.offset(), ()
        if p.accept(","):
            inner = self.operand()
            coordinates = inner.items if isinstance(inner, Vector) else (inner,)
        p.expect("]")
        return Address(base, offset, coordinates)


def _tokenize(text: str) -> tuple[list[str], list[str], list[int]]:
    kinds, tokens, lines, line, at = [], [], [], 1, 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise SyntaxError(f"line {line}: unexpected {text[at]!r}")
        if match.lastgroup != "space":
            kinds.append(match.lastgroup)
            tokens.append(match[0])
            lines.append(line)
        line += match[0].count("\n")
        at = match.end()
    return kinds, tokens, lines


def _spaced(tokens: list[str]) -> str:
    """The tokens of an instruction as one would write them."""
    text = " ".join(tokens)
    for pattern, replacement in ((r" ([\],;}+|])", r"\1"), (r"([\[{@!+|]) ", r"\1"), (r"- (?=\d)", "-")):
        text = re.sub(pattern, replacement, text)
    return text
