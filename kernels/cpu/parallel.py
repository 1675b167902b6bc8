"""One launcher for all kernels: the same work for every index from 0 to n, shared out over Numba's threads.

    @parallel()
    def _scale(i, x, y):
        y[i] = 2 * x[i]

    _scale(len(x), x, y)        # as: for i in range(len(x)): ...

Numba's own `prange` takes a loop apart, analyses what it reads and writes and compiles three functions around it. Here
the loop's body is a function already, so that the launcher is a few instructions: put the arguments where all threads
see them, and ask Numba's pool (OpenMP, TBB or its own) for the calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.callconv import Status, excinfo_ptr_t
from numba.extending import intrinsic
from numba.np.ufunc.parallel import _launch_threads

from .jit import helper, njit

_INT32, _INT64 = ir.IntType(32), ir.IntType(64)
_POINTER = ir.IntType(8).as_pointer()
_OTHER_STATUS = set(Status._fields) - {"code", "excinfoptr"}  # what a failure is passed on without


def parallel() -> Callable[[Callable], Any]:
    """Make `task(i, *arguments)` a function of Python, `task(n, *arguments)`, that runs it for all i < n.

    Threads take equal runs of neighbouring indices; a single task runs in the caller's. What a task raises (where
    memory is short) is raised by the launcher, after all others are done; of several, one.
    """

    def decorate(task: Callable) -> Any:
        index, *arguments = task.__code__.co_varnames[: task.__code__.co_argcount]
        names = ", ".join(arguments)
        text = f"def {task.__name__}({index}, {names}):\n    __launch(__task, {index}, ({names},))\n"
        where = {"__name__": task.__module__, "__launch": launch}
        exec(compile(text, task.__code__.co_filename, "exec"), where)  # as Numba wants to read a function's parameters
        launcher = where[task.__name__]
        launcher.__doc__ = task.__doc__
        launcher.__code__ = launcher.__code__.replace(co_firstlineno=task.__code__.co_firstlineno)
        where["__task"] = helper()(task)
        return njit()(launcher)

    return decorate


@intrinsic
def launch(typing_context, task, n, arguments):
    """task(i, *arguments) for i < n, on all threads."""
    kinds = (types.int64, *arguments)
    task.get_call_type(typing_context, kinds, {})  # compiles it

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        compiled, library = task.dispatcher.overloads[kinds], context.active_code_library
        library.add_linking_library(compiled.library)
        library._reload_init.add(_launch_threads)  # when it comes from the cache, too
        _launch_threads()
        shared = ir.LiteralStructType([args[2].type, _INT32, _POINTER])  # arguments, and what one failed with
        place = cgutils.alloca_once(builder, shared)
        for i, value in enumerate((args[2], ir.Constant(_INT32, 0), ir.Constant(_POINTER, None))):
            builder.store(value, cgutils.gep_inbounds(builder, place, 0, i))
        calls = _emit_calls(context, builder.module, compiled, kinds, shared)
        # The pool adds i times a step of 1 to the null pointer: the first index of a run of calls.
        first = cgutils.alloca_once_value(builder, ir.Constant(_POINTER, None))
        count, step = (cgutils.alloca_once_value(builder, v) for v in (args[1], ir.Constant(_INT64, 1)))
        threads = builder.call(_external(builder.module, "get_num_threads", _INT64), [])
        run = _external(builder.module, "numba_parallel_for", ir.VoidType(), *[_POINTER] * 5, *[_INT64] * 3)
        pointers = [builder.bitcast(p, _POINTER) for p in (calls, first, count, step, place)]
        with builder.if_else(builder.icmp_signed(">", args[1], ir.Constant(_INT64, 1))) as (several, alone):
            with several:
                builder.call(run, [*pointers, ir.Constant(_INT64, 0), ir.Constant(_INT64, 1), threads])
            with alone:  # no need to wake a thread
                builder.call(calls, [first, count, step, pointers[-1]])
        _raise_failure(context, builder, place)
        return context.get_dummy_value()

    return types.void(task, types.int64, arguments), emit


def _external(module: ir.Module, name: str, result: ir.Type, *arguments: ir.Type) -> ir.Function:
    return cgutils.get_or_insert_function(module, ir.FunctionType(result, arguments), name)


def _emit_calls(context: Any, module: ir.Module, compiled: Any, kinds: tuple, shared: ir.Type) -> ir.Function:
    """The function that a thread is given: calls of the task for a run of indices."""
    kind = ir.FunctionType(ir.VoidType(), [_POINTER.as_pointer(), *[_INT64.as_pointer()] * 2, _POINTER])
    function = ir.Function(module, kind, module.get_unique_name("calls"))
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block())
    first, count = builder.ptrtoint(builder.load(function.args[0]), _INT64), builder.load(function.args[1])
    place = builder.bitcast(function.args[3], shared.as_pointer())
    arguments = cgutils.unpack_tuple(builder, builder.load(cgutils.gep_inbounds(builder, place, 0, 0)))
    task = context.declare_function(module, compiled.fndesc)
    with cgutils.for_range(builder, count, intp=_INT64) as loop:
        status, _ = context.call_conv.call_function(
            builder, task, types.none, kinds, [builder.add(first, loop.index), *arguments]
        )
        with builder.if_then(status.is_error, likely=False):
            for i, value in enumerate((status.code, builder.bitcast(status.excinfoptr, _POINTER)), 1):
                builder.store(value, cgutils.gep_inbounds(builder, place, 0, i))
    builder.ret_void()
    return function


def _raise_failure(context: Any, builder: ir.IRBuilder, place: Any) -> None:
    """Raise what a task failed with."""
    code, info = (builder.load(cgutils.gep_inbounds(builder, place, 0, i)) for i in (1, 2))
    with builder.if_then(builder.icmp_signed("!=", code, code.type(0)), likely=False):
        failed = Status(code=code, excinfoptr=builder.bitcast(info, excinfo_ptr_t), **dict.fromkeys(_OTHER_STATUS))
        context.call_conv.return_status_propagate(builder, failed)
