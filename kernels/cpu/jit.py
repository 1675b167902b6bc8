"""Numba, set up once: flags, threads, and a disk cache that notices every edit.

Numba's own cache looks at one source file and misses an edit in a callee's file. Here the cache folder is named
after a hash of all source under `kernels/` that a CPU kernel could call, so that an edit anywhere starts afresh (Numba
adds its own version and the CPU to the key).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
from numba.core import config, event, types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import AnalysisPass, register_pass
from numba.core.extending import _Intrinsic
from numba.core.registry import CPUDispatcher
from numba.core.typed_passes import AnnotateTypes

# Threads that wait for work spin a little and then sleep. Waking one takes 45 microseconds, a spinning one 1. A step of
# ResNet-20 on two cores took 123 ms with 5,000 turns and 142 with none, and 3 % less with 15,000. Beside a process that
# keeps one of the cores busy 5,000 and 15,000 take as long, 15 % longer than none; OpenMP's own default, 300,000, makes
# it nine times as long there. Read by OpenMP when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "15000")

# Never "nnan" or "ninf": a NaN must stay a NaN.
FASTMATH = {"contract", "reassoc", "nsz"}
_SETTINGS = ("MINIRES_SIMD", "MINIRES_AMX")  # of features.py: what is compiled depends on them
_KEEP_DAYS = 30
_OURS = "minires.kernels."
_VIEWS = ("array.reshape", "array.view", "array.transpose", numba.carray, len)  # calls that make no array
_NOT_FOR_CPU = ("cuda", "interpreter")  # what begins like this: its edits change no CPU kernel


@functools.cache
def source_hash() -> str:
    """A hash of the CPU's Python source under kernels/ and of the settings that change what it compiles to."""
    digest = hashlib.sha256(repr([os.environ.get(name) for name in _SETTINGS]).encode())
    root = Path(__file__).parent.parent
    for path in sorted(root.rglob("*.py")):
        if any(part.startswith(_NOT_FOR_CPU) for part in path.relative_to(root).parts):
            continue
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def host_cpu() -> str:
    """The processor as the compiler sees it, and how many cores: what measured times belong to."""
    return f"{llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()} {os.cpu_count()}"


def cache_root() -> Path:
    """`$MINIRES_CACHE`, else the user's cache folder."""
    if own := os.environ.get("MINIRES_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minires"


@functools.cache
def cache_folder() -> str | None:
    """The folder of compiled kernels for this very source; None where none can be written."""
    folder = cache_root() / "numba" / source_hash()
    try:
        if not folder.exists():
            _sweep(folder.parent)
            folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
    except OSError:
        return None
    return str(folder) if os.access(folder, os.W_OK) else None


class _Announcer(event.Listener):
    """Says once why nothing seems to happen: kernels are compiled, and none was on disk."""

    said = False

    def on_start(self, event: Any) -> None:
        dispatcher = event.data.get("dispatcher")
        if self.said or dispatcher is None or not dispatcher.py_func.__module__.startswith(_OURS):
            return
        self.said, folder = True, cache_folder()
        if folder is None:
            where = "they cannot be kept: no cache folder can be written (MINIRES_CACHE names one)"
        elif any(Path(folder).rglob("*.nbi")):
            return  # most are there; a new shape or dtype takes a second or two
        else:
            where = f"they are kept in {cache_root()}"
        print(f"minires: compiling the CPU kernels, once, for some 20 seconds; {where}", file=sys.stderr, flush=True)

    def on_end(self, event: Any) -> None:
        """Nothing to say."""


event.register("numba:compile", _Announcer())


def _sweep(parent: Path) -> None:
    """Remove folders of earlier source that nobody used for a month."""
    for old in parent.glob("*"):
        if time.time() - old.stat().st_mtime > _KEEP_DAYS * 86400:
            shutil.rmtree(old, ignore_errors=True)


class _HelperLibrary(JITCodeLibrary):
    """The code of a helper: handed to its callers, and neither optimised nor turned into machine code by itself."""

    def _optimize_final_module(self) -> None:
        # Numba asks for the first only of a finished library; the second has no code of its own in the end.
        self._shared_module = self._final_module.clone()
        for module, linkage in ((self._shared_module, "linkonce_odr"), (self._final_module, "available_externally")):
            for function in module.functions:
                if not function.is_declaration and function.linkage == llvm.Linkage.external:
                    function.linkage = linkage


class _CallerLibrary(JITCodeLibrary):
    """The code of a function that Python calls, with its helpers in it as functions of its own.

    Else the linker takes one copy for all functions of the process, optimised as a part of whichever came first, and
    what a kernel computes, to the last bit, would depend on what was compiled or loaded before it.
    """

    def _optimize_final_module(self) -> None:
        super()._optimize_final_module()
        for function in self._final_module.functions:
            if not function.is_declaration and function.linkage == llvm.Linkage.linkonce_odr:
                function.linkage = "internal"


class _LoadedLibrary(JITCodeLibrary):
    """The code of a function that was found on disk. Numba has read its intermediate code, too, for callers that may
    yet be compiled: half a MiB for each, 27 of the 99 that a ResNet-50's kernels take. It is read again if they are.
    """

    def _get_module_for_linking(self) -> Any:
        if self._shared_module is None:
            self._shared_module = llvm.parse_bitcode(self._bitcode)
        return self._shared_module

    @classmethod
    def let_go(cls, library: Any) -> None:
        """Make it one of these."""
        library.__class__, module, library._shared_module = cls, library._shared_module, None
        library._bitcode = module.as_bitcode()
        module.close()


def _counts_references(state: Any) -> bool:
    """Whether a function must count references to arrays: it may make one, or return one.

    Numba counts one up and down at every slice, by a locked instruction on a number that lies beside the array: where
    threads take rows of the same array, the line of that number goes from one to the other, at 0.1 microseconds each.
    Views (slices among them), our intrinsics, and calls of other kernels' functions that return no array, need none of
    it.
    """

    def counted(*kinds: Any) -> bool:
        return any(state.targetctx.data_model_manager[kind].contains_nrt_meminfo() for kind in kinds)

    for expression, signature in state.calltypes.items():
        if signature is None or not counted(signature.return_type, *signature.args, *filter(None, [signature.recvr])):
            continue
        name, made = getattr(expression, "op", None), counted(signature.return_type)
        if name == "call":
            function = state.typemap[expression.func.name]
            name = getattr(function, "typing_key", None)
            ours = isinstance(function, types.Dispatcher) or isinstance(name, _Intrinsic)
            if name not in _VIEWS and (made or not ours):
                return True
        elif name not in ("getitem", "static_getitem") and made:
            return True
        elif counted(*signature.args[1:]):  # x[...] = array, x[array]
            return True
    return counted(state.return_type)


def _into(kind: type[JITCodeLibrary]) -> type[CompilerBase]:
    """Numba's own passes, with another library at their end."""

    @register_pass(mutates_CFG=False, analysis_only=True)
    class ChooseLibrary(AnalysisPass):
        _name = f"minires{kind.__name__}"

        def __init__(self) -> None:
            super().__init__()

        def run_pass(self, state: Any) -> bool:
            state.library = kind(state.targetctx.codegen(), state.func_id.func_qualname)
            state.library.enable_object_caching()
            if not _counts_references(state):
                state.flags.nrt, state.targetctx = False, state.targetctx.subtarget(enable_nrt=False)
            return True

    class Compiler(CompilerBase):
        def define_pipelines(self) -> list[Any]:
            passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
            passes.add_pass_after(ChooseLibrary, AnnotateTypes)
            passes.finalize()
            return [passes]

    return Compiler


_HELPER, _CALLER = _into(_HelperLibrary), _into(_CallerLibrary)


def njit() -> Callable[[Callable], Any]:
    """`numba.njit` with our flags and our cache, for a function that Python calls.

    Keep the work itself in a `helper`: that compiles several times faster. Many tasks: `cpu/parallel.py`.
    """
    return _compiled(cache=True, pipeline_class=_CALLER)


def helper(*, inline: bool = False) -> Callable[[Callable], Any]:
    """`njit` for a function that only compiled code calls: Python cannot, as nothing is made for it to call.

    Numba would optimise and translate such a function by itself, and again as a part of each caller: half of all the
    time that compiling takes. It is kept on disk as a part of them. inline: put it into the caller's loop.
    """
    options: dict[str, Any] = {"forceinline": True} if inline else {}
    return _compiled(cache=False, pipeline_class=_HELPER, no_cpython_wrapper=True, **options)


def _compiled(*, cache: bool, **options: Any) -> Callable[[Callable], Any]:
    def decorate(fn: Callable) -> Any:
        folder = cache_folder()
        saved = config.CACHE_DIR
        config.CACHE_DIR = folder or saved
        try:
            dispatcher = numba.njit(
                cache=cache and folder is not None,
                nogil=True,
                boundscheck=False,
                error_model="numpy",
                fastmath=FASTMATH,
                no_cfunc_wrapper=True,
                **options,
            )(fn)
        finally:
            config.CACHE_DIR = saved
        if cache and folder is not None:
            file = dispatcher._cache._cache_file
            file._data_name = functools.partial(_unique, fn.__name__)
        if cache:
            dispatcher.__class__ = _Noted
        return dispatcher

    return decorate


class _Now(threading.local):
    """Who is told, in this thread, of each compiled function that Python calls."""

    note: Callable[[Any, tuple], None] | None = None


_now = _Now()


class _Noted(CPUDispatcher):
    """A compiled function that tells of its calls."""

    def add_overload(self, cres: Any) -> None:
        super().add_overload(cres)
        if cres.library._shared_module is not None:
            _LoadedLibrary.let_go(cres.library)

    def __call__(self, *arguments: Any) -> Any:
        if _now.note is not None:
            _now.note(super().__call__, arguments)
        return super().__call__(*arguments)


def call_noted(function: Callable, *arguments: Any) -> None:
    """function(*arguments), of which `noted` is told as of a compiled one: for what NumPy writes into arrays that are
    among the arguments, and takes from these alone."""
    if _now.note is not None:
        _now.note(function, arguments)
    function(*arguments)


@contextlib.contextmanager
def noted(note: Callable[[Any, tuple], None]) -> Iterator[None]:
    """Within it, `note(function, arguments)` is called before each call of a compiled function in this thread, and by
    `call_noted`; what it is told of can be called again, and tells nobody."""
    saved, _now.note = _now.note, note
    try:
        yield
    finally:
        _now.note = saved


def _unique(name: str, number: int) -> str:
    """A name for compiled code that no other process takes.

    Numba counts them, 1, 2, ...: two processes that compile one function for different dtypes at the same time would
    both write the first, and the one that wrote its index last would call the other's code ever after.
    """
    return f"{name}.{uuid.uuid4().hex}.nbc"


def set_num_threads(n: int) -> None:
    """How many threads the CPU kernels use, from 1 to the number that the process started with."""
    most = config.NUMBA_NUM_THREADS
    if not 1 <= n <= most:
        raise ValueError(f"set_num_threads({n}): this process can use 1 to {most} threads")
    numba.set_num_threads(n)


def get_num_threads() -> int:
    """How many threads the CPU kernels use."""
    return numba.get_num_threads()
