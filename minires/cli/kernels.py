"""`minires kernels`: the table of registered kernels, and the check of one's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from cyclopts import App

app = App(name="kernels", help="List the registered kernels, or check some.")


@app.command(name="list")
def list_kernels(problem: str | None = None, /, *, device: str | None = None) -> None:
    """List the registered kernels: problem, device, step of the ladder, name, what the step changed.

    Parameters
    ----------
    problem
        Only the kernels of this problem.
    device
        Only the kernels of this device, cpu or cuda.
    """
    registry = _registry()
    rows = [(k.problem.name, k.device, str(k.step), k.name, k.note) for k in registry.kernels(_known(problem), device)]
    if not rows:
        raise ValueError(f"no kernel is registered for device {device!r}; there are some for cpu and cuda")
    _print_table(("problem", "device", "step", "kernel", "note"), rows)


@app.command
def check(
    file: Path | None = None,
    /,
    *,
    problem: str | None = None,
    device: Literal["cpu", "cuda", "interpret"] | None = None,
    time: bool = False,
) -> int:
    """Check kernels on all test cases of their problems, in every dtype and layout that they take.

    With `--device interpret`, CUDA kernels on a machine without a GPU: their PTX is run on the CPU, and every access to
    memory is watched. Right is called "interpreted" there: no GPU has confirmed it. Exit code 0 where all are right, 1
    where one is wrong, 2 for bad input.

    Parameters
    ----------
    file
        A Python file of your own that registers kernels (`from minires.kernels.registry import kernel, problem`), or
        a .cu file that begins with /* minires: PROBLEM, its launch, and */. Only what it registers is checked.
    problem
        Check only kernels of this problem; without a file, all that are registered for it.
    device
        cpu; cuda, for CUDA kernels on a GPU; or interpret, for CUDA kernels without one (all of them, where neither a
        file nor a problem is named). By default cpu; for a .cu file the GPU, if there is one, else interpret.
    time
        Also time the CPU kernels that are right, beside all others of their problem, on the first benchmark case.
    """
    if device is None:
        device = _default_device(file)
    if file is None and problem is None and device != "interpret":
        raise ValueError("say what to check: a FILE.py that registers kernels, or --problem NAME")
    if time and device != "cpu":
        raise ValueError(f"--time goes with --device cpu, not {device}: python -m benchmarks times on a GPU")
    registry = _registry()
    candidates = registry.load_file(file) if file is not None else registry.kernels(_known(problem))
    chosen = [k for k in _for_device(candidates, device) if _known(problem) in (None, k.problem.name)]
    if not chosen:
        kind = "CPU" if device == "cpu" else "CUDA"
        raise ValueError(f"{file or problem} has no {kind} kernel" + (f" of {problem}" if file and problem else ""))
    results = {k: _checks(k, device) for k in chosen}
    _print_table(
        ("problem", "kernel", "checks", "worst error", "allowed", "verdict"),
        [_summary(k, found, "right" if device == "cpu" else "interpreted") for k, found in results.items()],
    )
    for found in results.values():
        for failure in dict.fromkeys(r.failure for r in found if not r.ok):
            print(next(r for r in found if r.failure == failure))
    right = [k for k, found in results.items() if found and all(r.ok for r in found)]
    if time:
        for name in dict.fromkeys(k.problem.name for k in right):
            _print_times(name, [k for k in right if k.problem.name == name])
    return 0 if len(right) == len(chosen) else 1


@app.command(name="compile")
def compile_kernels(*, problem: str | None = None, arch: list[str] | None = None) -> int:
    """Compile every CUDA kernel for every GPU arch that it declares; no GPU is needed.

    Prints registers per thread and shared memory per block. Exit code 1 where one does not compile, spills registers,
    exceeds its budget of them, or ptxas advises that it ignored something (C75xx).

    Parameters
    ----------
    problem
        Only the kernels in the folder of this problem.
    arch
        Only these archs, such as sm_80; may be given several times.
    """
    from minires.kernels.cuda.launch import ARCHS, functions  # pyright: ignore[reportMissingImports]
    from minires.kernels.cuda.survey import survey  # pyright: ignore[reportMissingImports]

    folders = {Path(k.fn.__code__.co_filename).parent for k in _registry().kernels(_known(problem), "cuda")}
    chosen = [f for f in functions() if f.file.parent in folders]
    known = sorted({a for f in chosen for a in f.archs}, key=lambda a: (len(a), a))
    if unknown := sorted(set(arch or ()) - set(known)):
        raise ValueError(f"no kernel is made for {', '.join(unknown)}; known: {', '.join(known or ARCHS)}")
    found = survey(chosen, arch)
    archs = [a for a in known if arch is None or a in arch]
    registers = {(c.function, c.arch): "-" if c.usage is None else str(c.usage.registers) for c in found}
    rows = []
    for f in chosen:
        mine = [c for c in found if c.function == f]
        shared = max((c.usage.shared for c in mine if c.usage), default=0)
        verdict = "broken" if any(c.faults for c in mine) else "ok" if mine else "not for these"
        options = " ".join(option.removeprefix("-D").lower() for option in f.options)
        rows.append((f.file.name, f.entry, options, *(registers.get((f, a), "") for a in archs), str(shared), verdict))
    _print_table(("source", "kernel", "options", *archs, "shared", "verdict"), rows)
    broken = [c for c in found if c.faults]
    for c in broken:
        print(f"{c.function.entry} {c.arch}: {'; '.join(c.faults)}")
    print(f"{len(found)} compilations of {len(chosen)} kernels, {len(broken)} broken (numbers: registers per thread)")
    return 1 if broken else 0


def _default_device(file: Path | None) -> Literal["cpu", "cuda", "interpret"]:
    """Where kernels are checked unless the user says."""
    if file is None or file.suffix != ".cu":
        return "cpu"
    from .. import cuda

    return "cuda" if cuda.is_available() else "interpret"


def _for_device(kernels: Sequence, device: str) -> list:
    """Those for the device, ready to be called with NumPy arrays. RuntimeError where it is not there."""
    if device == "cpu":
        return [k for k in kernels if k.device == "cpu"]
    chosen = [k for k in kernels if k.device == "cuda"]
    if device == "interpret":
        from minires.kernels.cuda.compile import nvrtc  # pyright: ignore[reportMissingImports]

        nvrtc()  # raises where there is none
        return chosen
    from minires.kernels.cuda.gpu import from_host  # pyright: ignore[reportMissingImports]

    from ..device import array_module
    from ..device import device as as_device

    array_module(as_device("cuda"))  # raises where there is none
    return [from_host(k) for k in chosen]


def _registry() -> Any:
    from minires.kernels import registry  # pyright: ignore[reportMissingImports]

    return registry


def _known(problem: str | None) -> str | None:
    """The name of a problem, or ValueError with the names that there are."""
    names = [p.name for p in _registry().problems()]
    if problem is not None and problem not in names:
        raise ValueError(f"no problem is named {problem!r}; known: {', '.join(names)}")
    return problem


def _checks(kernel: Any, device: str) -> list:
    """The results of all checks of one kernel."""
    if device == "interpret":
        from minires.kernels.interpreter.check import check_all_cases  # pyright: ignore[reportMissingImports]

        return list(check_all_cases(kernel))
    from minires.kernels.checking import check_case  # pyright: ignore[reportMissingImports]

    return [r for case in kernel.problem.cases if "test" in case.tags for r in check_case(kernel, case)]


def _summary(kernel: Any, results: list, good: str) -> tuple[str, ...]:
    worst = max((r.worst for r in results if r.ok), default=float("nan"))
    failures = Counter(r.failure for r in results if not r.ok)
    verdict = ", ".join(f"{failure} ({count})" for failure, count in failures.items()) or good
    if not results:
        verdict = "takes no test case"
    return (
        kernel.problem.name,
        kernel.name,
        str(len(results)),
        f"{worst:.2g} eps" if worst == worst else "",
        f"{kernel.error_factor:g} eps",
        verdict,
    )


def _print_times(problem: str, chosen: list) -> None:
    """Rank the kernels of a problem on its first benchmark case in float32 that all the chosen ones take."""
    from minires.kernels.checking import Trial, lay_out  # pyright: ignore[reportMissingImports]
    from minires.kernels.timing import in_turn  # pyright: ignore[reportMissingImports]

    registry = _registry()
    for case in registry.problem(problem).cases:
        if "bench" not in case.tags:
            continue
        trial = Trial(registry.problem(problem), case, "float32")
        layouts = {name: "contiguous" if name == "w" else "channels_last" for name in trial.arrays}
        arrays = [None if a is None else lay_out(a, layouts[name])[0] for name, a in trial.arrays.items()]
        if all(k.takes(*arrays, **trial.params) for k in chosen):
            break
    else:
        print(f"{problem}: no benchmark case in float32 suits")
        return
    others = [k for k in registry.kernels(problem, "cpu") if k.step > 0 or k in chosen]
    runs = {k.name: lambda k=k: k(*arrays, **trial.params) for k in others if k.takes(*arrays, **trial.params)}
    flops = trial.problem.flops(*arrays, **trial.params)
    rows = []
    for name, timing in sorted(in_turn(runs).items(), key=lambda item: item[1].median):
        speed = f"{flops / timing.median / 1e9:.3g} GFLOP/s"
        rows.append((name, f"{timing.median * 1e3:.3g} ms", speed, "yes" if name in {k.name for k in chosen} else ""))
    _print_table((f"{problem}, {case.name}", "median", "speed", "checked now"), rows)


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    for name in header:
        table.add_column(name, no_wrap=name != "note")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:  # a pipe has no width: cut nothing off
        console = Console(width=250)
    console.print(table, highlight=False, markup=False)
