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
from .placement import BOUND, NOTES, prepare, release, take_place

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
        text = (
            f"def {task.__name__}({index}, {names}):\n"
            f"    __launch(__task, __prepare, __take, __release, {index}, ({names},))\n"
        )
        where = {"__name__": task.__module__, "__launch": launch, "__task": helper()(task)}
        where |= {"__prepare": prepare, "__take": take_place, "__release": release}
        exec(compile(text, task.__code__.co_filename, "exec"), where)  # as Numba wants to read a function's parameters
        launcher = where[task.__name__]
        launcher.__doc__ = task.__doc__
        launcher.__code__ = launcher.__code__.replace(co_firstlineno=task.__code__.co_firstlineno)
        return njit()(launcher)

    return decorate


@intrinsic
def launch(typing_context, task, prepare, take, release, n, arguments):
    """task(i, *arguments) for i < n, on all threads; the other functions keep these apart (placement.py)."""
    notes = types.voidptr
    kinds = {task: (types.int64, *arguments), prepare: (notes,), take: (notes, notes), release: (notes,)}
    for function, takes in kinds.items():
        function.get_call_type(typing_context, takes, {})  # compiles it

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        *_, n, arguments = args
        functions = [(function.dispatcher.overloads[takes], takes) for function, takes in kinds.items()]
        for function, _ in functions:
            context.active_code_library.add_linking_library(function.library)
        context.active_code_library._reload_init.add(_launch_threads)  # when it comes from the cache, too
        _launch_threads()
        # The arguments, what a task failed with, and the threads' notes.
        shared = ir.LiteralStructType([arguments.type, _INT32, _POINTER, ir.ArrayType(_INT64, NOTES)])
        place = cgutils.alloca_once(builder, shared)
        for i, value in enumerate((arguments, ir.Constant(_INT32, 0), ir.Constant(_POINTER, None))):
            builder.store(value, cgutils.gep_inbounds(builder, place, 0, i))
        notes = cgutils.gep_inbounds(builder, place, 0, 3)
        cgutils.memset(builder, notes, ir.Constant(_INT64, 8 * NOTES), 0)
        calls = _emit_calls(context, builder.module, functions, shared)
        # The pool adds i times a step of 1 to the null pointer: the first index of a run of calls.
        first = cgutils.alloca_once_value(builder, ir.Constant(_POINTER, None))
        count, step = (cgutils.alloca_once_value(builder, v) for v in (n, ir.Constant(_INT64, 1)))
        threads = builder.call(_external(builder.module, "get_num_threads", _INT64), [])
        run = _external(builder.module, "numba_parallel_for", ir.VoidType(), *[_POINTER] * 5, *[_INT64] * 3)
        pointers = [builder.bitcast(p, _POINTER) for p in (calls, first, count, step, place)]
        many = [builder.icmp_signed(">", number, ir.Constant(_INT64, 1)) for number in (n, threads)]
        with builder.if_else(builder.and_(*many)) as (several, alone):
            with several:
                _emit_call(context, builder, functions[1], builder.bitcast(notes, _POINTER))
                builder.call(run, [*pointers, ir.Constant(_INT64, 0), ir.Constant(_INT64, 1), threads])
                _emit_call(context, builder, functions[3], builder.bitcast(notes, _POINTER))
            with alone:  # no need to wake a thread
                builder.call(calls, [first, count, step, pointers[-1]])
        _raise_failure(context, builder, place)
        return context.get_dummy_value()

    return types.void(task, prepare, take, release, types.int64, arguments), emit


def _external(module: ir.Module, name: str, result: ir.Type, *arguments: ir.Type) -> ir.Function:
    return cgutils.get_or_insert_function(module, ir.FunctionType(result, arguments), name)


def _emit_call(context: Any, builder: ir.IRBuilder, function: tuple[Any, tuple], *arguments: Any) -> Status:
    compiled, takes = function
    code = context.declare_function(builder.module, compiled.fndesc)
    return context.call_conv.call_function(builder, code, types.none, takes, arguments)[0]


def _emit_calls(context: Any, module: ir.Module, functions: list[tuple[Any, tuple]], shared: ir.Type) -> ir.Function:
    """The function that a thread is given: calls of the task for a run of indices."""
    kind = ir.FunctionType(ir.VoidType(), [_POINTER.as_pointer(), *[_INT64.as_pointer()] * 2, _POINTER])
    function = ir.Function(module, kind, module.get_unique_name("calls"))
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block())
    task, _, take, _ = functions
    first, count = builder.ptrtoint(builder.load(function.args[0]), _INT64), builder.load(function.args[1])
    place = builder.bitcast(function.args[3], shared.as_pointer())
    arguments = cgutils.unpack_tuple(builder, builder.load(cgutils.gep_inbounds(builder, place, 0, 0)))
    notes = builder.bitcast(cgutils.gep_inbounds(builder, place, 0, 3), _POINTER)
    bound = module.globals.get(BOUND) or cgutils.add_global_variable(module, ir.IntType(8), BOUND)
    _emit_call(context, builder, take, notes, bound)
    with cgutils.for_range(builder, count, intp=_INT64) as loop:
        status = _emit_call(context, builder, task, builder.add(first, loop.index), *arguments)
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
