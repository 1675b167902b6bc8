"""The shape of the house, held by reading its source: who imports whom, how long a page is, what stays lazy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {
    path.relative_to(ROOT): path
    for folder in ("minires", "kernels", "benchmarks", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
TREES = {path: ast.parse(file.read_text()) for path, file in SOURCES.items() if path.parts[0] in ("minires", "kernels")}

# Each part of minires/ with the parts that it may import, itself apart.
_BELOW = {"device", "handle", "methods", "random", "state"}
_ENGINE = _BELOW | {"engine"}
_OPS = _ENGINE | {"autocast", "cuda", "dispatch", "ops", "hooks"}
_NN = _OPS | {"creation", "nn"}
_MODELS = _NN | {"optim", "data", "interop", "models", "serialization"}
_RUNS = _MODELS | {"amp", "capture", "grad_cam", "gradcheck", "jit", "train", "study", "kernels"}
MAY_IMPORT = {
    "kernels": set(),
    "device": set(),
    "handle": set(),
    "methods": set(),
    "random": {"device"},
    "cuda": {"device", "random", "state"},
    "state": set(),
    "engine": _BELOW,
    "tuning": {"device", "kernels"},
    "dispatch": {"device", "kernels", "tuning"},
    "hooks": _ENGINE | {"dispatch"},
    "autocast": _ENGINE | {"dispatch"},
    "ops": _ENGINE | {"autocast", "cuda", "dispatch"},
    "creation": _OPS,
    "serialization": _ENGINE,
    "capture": _OPS,
    "grad_cam": _OPS | {"capture"},
    "gradcheck": _OPS,
    "nn": _OPS | {"creation"},
    "jit": _NN | {"hooks"},
    "optim": _NN,
    "amp": _NN | {"optim"},
    "data": _NN,
    "interop": _NN | {"serialization"},
    "models": _MODELS,
    "train": _RUNS - {"study"},
    "study": _RUNS,
    "cli": _RUNS | {"cli"},
    "__init__": _RUNS | {"cli"},
    "__main__": {"cli"},
}


def _imports(path):
    """(module that is imported, line) for every import that runs; those for type checkers only do not."""
    package = (path.parts if path.parts[0] == "minires" else ("minires", *path.parts))[:-1]
    waiting = [TREES[path]]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *(node.module.split(".") if node.module else ())))
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)
        waiting += ast.iter_child_nodes(node)


def _part(path):
    """Which part of minires a file belongs to."""
    return "kernels" if path.parts[0] == "kernels" else Path(path.parts[1]).stem


def test_each_part_imports_only_what_stands_below_it():
    wrong = []
    for path in TREES:
        part = _part(path)
        assert part in MAY_IMPORT, f"{path}: give {part!r} its place in MAY_IMPORT"
        for module, line in _imports(path):
            names = module.split(".")
            if names[0] == "minires" and len(names) > 1:
                to = names[1] if names[1] in MAY_IMPORT else "__init__"
                if to != part and to not in MAY_IMPORT[part]:
                    wrong.append(f"{path}:{line}: {part} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_no_part_stands_above_what_it_is_imported_by():
    """The table itself has no circle, other than a part with itself."""

    def reach(part, seen):
        for below in MAY_IMPORT[part] - {part} - seen:
            reach(below, seen | {part})
            assert part not in MAY_IMPORT[below], f"{part} and {below} may import each other"

    for part in MAY_IMPORT:
        reach(part, set())


@pytest.mark.parametrize(
    "library, allowed",
    [
        ("torch", ("nowhere",)),
        ("cupy", ("minires/device.py", "kernels/cuda/")),
        ("numba", ("kernels/",)),
        ("llvmlite", ("kernels/",)),
        ("onnx", ("minires/interop/onnx.py",)),
        ("onnxruntime", ("minires/models/export.py",)),
        ("pickle", ("minires/data/workers.py",)),
    ],
)
def test_library_is_imported_only_where_it_belongs(library, allowed):
    for path, tree in TREES.items():
        modules = [module for module, _ in _imports(path)]
        for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call) and n.args):
            if ast.unparse(call.func).split(".")[-1] in ("import_module", "__import__", "find_spec"):
                modules.append(ast.unparse(call.args[0]).strip("'"))
        used = library in {module.partition(".")[0] for module in modules}
        assert not used or path.as_posix().startswith(allowed), f"{path} uses {library}"


def test_registry_is_read_by_dispatch_and_tools_only():
    for path in TREES:
        part = _part(path)
        for module, line in _imports(path):
            if module.startswith("minires.kernels") and part not in ("kernels", "dispatch", "cli"):
                assert module.startswith("minires.kernels.cpu.jit."), f"{path}:{line}: {part} imports {module}"


def test_kernels_allocate_where_tests_can_poison():
    """`np.empty` only in kernels/memory.py, for what it takes (cpu/pools.py), and as scratch of compiled functions."""
    wrong = []
    for path, tree in TREES.items():
        if path.parts[0] == "kernels" and path.name not in ("memory.py", "pools.py"):
            compiled = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and _is_compiled(n)]
            inside = {id(n) for function in compiled for n in ast.walk(function)}
            for n in ast.walk(tree):
                if isinstance(n, ast.Attribute) and n.attr in ("empty", "empty_like") and id(n) not in inside:
                    wrong.append(f"{path}:{n.lineno}: use memory.empty")
    assert not wrong, "\n".join(wrong)


def _is_compiled(function):
    return any(ast.unparse(d).startswith(("njit", "helper", "parallel", "intrinsic")) for d in function.decorator_list)


def test_pages_are_short_enough_to_read():
    long = []
    for path, file in SOURCES.items():
        lines = len(file.read_text().splitlines())
        limit = 150 if path.parts[:2] == ("minires", "ops") else 249 if path.as_posix() == "minires/engine.py" else 500
        if lines > limit:
            long.append(f"{path} has {lines} lines, more than {limit}")
    assert not long, "\n".join(long)


def test_every_folder_is_a_package():
    folders = {path.parent for path in SOURCES if path.parts[0] in ("minires", "kernels")}
    folders |= {parent for folder in folders for parent in folder.parents if parent.parts}
    assert not [str(folder) for folder in folders if not (ROOT / folder / "__init__.py").exists()]


def test_kernels_are_never_imported_under_their_folder_name():
    assert not [name for name in sys.modules if name.partition(".")[0] == "kernels"]
    done = subprocess.run([sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "installed as minires.kernels" in done.stderr


def test_importing_minires_leaves_the_rest_for_later(tmp_path):
    code = "import sys, minires; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    lazy = {"torch", "cupy", "matplotlib", "sklearn", "PIL", "rich", "cyclopts", "onnx", "pooch", "kernels"}
    assert not lazy & set(done.stdout.split())
