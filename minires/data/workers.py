"""Worker processes of a `DataLoader`: started anew (never forked), fed and read over one pipe each.

A fork would copy locks and thread pools in whatever state they are (OpenMP's kills the child), so workers are spawned.
Each gets the data set once, then tasks (epoch, step, indices), and answers them in order. The arrays of a batch come
back in memory that both processes map: an anonymous file whose descriptor travels over the pipe. It has no name, so
nothing stays behind however a process ends, and it needs no room in /dev/shm. (Only Linux has such files; elsewhere
the pipe carries the arrays themselves.)

Workers ignore Ctrl-C and SIGTERM (they reach all processes of a terminal or job: the training loop decides what they
mean) and end when their pipe closes, which is also what they see when the main process is killed.
"""

from __future__ import annotations

import io
import math
import mmap
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Iterable, Iterator
from multiprocessing import reduction, resource_tracker, util
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from ..engine import Tensor
from .collate import BatchMaker

Task = tuple[int, int, np.ndarray]  # epoch, step, indices
_HELD = {signal.SIGINT, signal.SIGTERM}
_ALIGN = 64
_PATIENCE = 2.0  # seconds that workers may take to end by themselves
_SHARES = hasattr(os, "memfd_create")


class WorkerPool:
    """`count` processes that make batches with `maker`. Raises ValueError where it cannot be pickled.

    shares: whether arrays come back in shared memory. close() ends the processes; so does losing the last reference to
    the pool, and the end of the program.
    """

    def __init__(self, maker: BatchMaker, count: int, shares: bool = _SHARES):
        if not hasattr(signal, "pthread_sigmask"):
            raise ValueError("workers='process' needs Linux or macOS; use workers='thread'")
        payload = _pickled(maker)
        context = multiprocessing.get_context("spawn")
        self.shares = shares
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        # before SIGINT is held back: it lets both signals through again when it starts
        resource_tracker.ensure_running()
        self.close = util.Finalize(self, _end, (self.pipes, self.processes), exitpriority=100)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)  # children inherit it, from their first instruction
        try:
            for i in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, shares), name=f"DataLoader-{i}", daemon=True)
                process.start()
                theirs.close()
                self.pipes.append(ours)
                self.processes.append(process)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for i in range(count):  # all are starting by now
            self._send(i, payload)

    def run(self, tasks: Iterable[Task], ahead: int) -> Iterator[Any]:
        """The batches of the tasks, in order, of which each worker makes up to `ahead` before they are asked for.

        Raises what making a batch raised, with the worker's traceback as a note, and RuntimeError where a worker has
        died. After an error, or where the loop over it is left early, only close() is of use.
        """
        count = len(self.processes)
        if not self.shares:  # a worker that is writing a batch reads no task, so let it have one at a time
            ahead = 1
        waiting, sent, received = iter(tasks), 0, 0
        while True:
            while sent < received + count * ahead and (task := next(waiting, None)) is not None:
                self._send(sent % count, pickle.dumps(task, 5))
                sent += 1
            if received == sent:
                return
            yield self._receive(received % count)
            received += 1

    def _send(self, i: int, message: bytes) -> None:
        try:
            self.pipes[i].send_bytes(message)
        except OSError:
            raise self._died(i) from None

    def _receive(self, i: int) -> Any:
        try:
            good, message, sizes = pickle.loads(self.pipes[i].recv_bytes())
            buffers = _mapped(reduction.recv_handle(self.pipes[i]), sizes) if sizes else []
        except (EOFError, ConnectionError):
            raise self._died(i) from None
        result = pickle.loads(message, buffers=buffers)
        if good:
            return result
        error, text = result
        if error is None:
            raise RuntimeError(f"DataLoader: worker process {i} failed: {text.strip()}")
        error.add_note(f"(in worker process {i})\n{text}")
        raise error

    def _died(self, i: int) -> RuntimeError:
        process = self.processes[i]
        process.join(_PATIENCE)
        code = process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        return RuntimeError(
            f"DataLoader: worker process {i} {how}; if it was killed, memory may have run out; a script that uses "
            "workers='process' must start its work under `if __name__ == '__main__':`"
        )


def _end(pipes: list[Connection], processes: list[Any]) -> None:
    for pipe in pipes:
        pipe.close()
    deadline = time.monotonic() + _PATIENCE
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
        if process.exitcode is None:  # in the middle of a batch; it holds nothing that could be lost
            process.kill()
            process.join()
        process.close()


def _pickled(maker: BatchMaker) -> bytes:
    try:
        return bytes(reduction.ForkingPickler.dumps(maker))
    except Exception as error:
        raise ValueError(
            "workers='process' needs a data set and functions that can be pickled (no lambdas, no open files): "
            f"{error}; or use workers='thread'"
        ) from error


# --- in the worker ------------------------------------------------------------------------------------------------


def _work(pipe: Connection, shares: bool) -> None:
    try:
        try:
            maker = pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionError):
            raise
        except Exception as error:  # a module that cannot be imported here, for example
            return _answer(pipe, False, _portable(error), False)
        while True:
            epoch, step, indices = pickle.loads(pipe.recv_bytes())
            try:
                good, result = True, maker.make(epoch, step, indices)
            except Exception as error:
                good, result = False, _portable(error)
            _answer(pipe, good, result, shares)
    except (EOFError, ConnectionError):  # the loader is done with this worker, or gone
        pass


def _answer(pipe: Connection, good: bool, result: Any, shares: bool) -> None:
    """Send (good, pickled result, sizes of its arrays); if there are any, then a descriptor of what holds them."""
    descriptor = -1
    try:
        try:
            message, buffers = _flattened(result, shares)
            descriptor = _shared(buffers) if buffers else -1
        except Exception as error:  # no memory, or a result that cannot be pickled
            if not isinstance(error, OSError):
                error = TypeError(f"workers='process' needs batches that can be pickled: {error}")
            good, (message, buffers) = False, _flattened(_portable(error), False)
        pipe.send_bytes(pickle.dumps((good, message, [buffer.nbytes for buffer in buffers]), 5))
        if buffers:
            reduction.send_handle(pipe, descriptor, os.getppid())
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _portable(error: Exception) -> tuple[Exception | None, str]:
    """The error and its traceback; or, if it does not survive pickling, None and what it says."""
    try:
        pickle.loads(pickle.dumps(error))
        return error, "".join(traceback.format_exception(error))
    except Exception:
        return None, traceback.format_exception_only(error)[0]


# --- batches as bytes ---------------------------------------------------------------------------------------------


class _Pickler(pickle.Pickler):
    """Leaves the numbers of arrays to `buffer_callback`, with the order of axes in memory kept."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is Tensor:
            return Tensor, (value.array,)
        if type(value) is np.ndarray and not value.flags.c_contiguous and not value.dtype.hasobject:
            order = sorted(range(value.ndim), key=lambda axis: -abs(value.strides[axis]))
            plain = value.transpose(order)
            if plain.flags.c_contiguous:  # channels-last, for one
                return np.transpose, (plain, tuple(np.argsort(order).tolist()))
        return NotImplemented


def _flattened(value: Any, apart: bool) -> tuple[bytes, list[memoryview]]:
    """The value as a pickle, and the memory of its arrays, which is not in the pickle if it is to be kept apart."""
    buffers: list[pickle.PickleBuffer] = []
    stream = io.BytesIO()
    _Pickler(stream, protocol=5, buffer_callback=buffers.append if apart else None).dump(value)
    return stream.getvalue(), [buffer.raw() for buffer in buffers]


def _room(size: int) -> int:
    return math.ceil(size / _ALIGN) * _ALIGN


def _shared(buffers: list[memoryview]) -> int:
    """The descriptor of an anonymous file that holds the buffers, each at a multiple of 64 bytes."""
    descriptor, offset = os.memfd_create("minires-batch"), 0
    try:
        for buffer in buffers:
            rest, place = buffer, offset
            while rest.nbytes:
                written = os.pwrite(descriptor, rest, place)
                rest, place = rest[written:], place + written
            offset += _room(buffer.nbytes)
        os.ftruncate(descriptor, offset)
        return descriptor
    except BaseException:
        os.close(descriptor)
        raise


def _mapped(descriptor: int, sizes: list[int]) -> list[memoryview]:
    """The buffers that the descriptor's file holds, writable and private to this process."""
    try:
        total = sum(map(_room, sizes))
        memory = memoryview(mmap.mmap(descriptor, total) if total else b"")
    finally:
        os.close(descriptor)
    buffers, offset = [], 0
    for size in sizes:
        buffers.append(memory[offset : offset + size])
        offset += _room(size)
    return buffers
