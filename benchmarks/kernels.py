"""The ladder of a group of problems: every kernel on every benchmark case, checked, then timed beside PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from minires.kernels import registry  # pyright: ignore[reportMissingImports]
from minires.kernels.checking import Trial, Wrong, lay_out  # pyright: ignore[reportMissingImports]
from minires.kernels.cpu.jit import get_num_threads  # pyright: ignore[reportMissingImports]
from minires.kernels.timing import in_turn  # pyright: ignore[reportMissingImports]

from .peers import load_torch, peer
from .provenance import write

PEER = "torch"
FIRST_STEP = 1  # step 0, the definition, is only timed where asked for


def kernels(
    group: str,
    /,
    *,
    case: str | None = None,
    seconds: float = 1.0,
    every_step: bool = False,
    kernels: Annotated[list[Path] | None, Parameter(negative=())] = None,
    output: Path | None = None,
) -> None:
    """Time the CPU kernels of all problems whose name starts with GROUP, such as conv2d or conv2d_fprop.

    Parameters
    ----------
    group
        How the problems' names start.
    case
        Only this benchmark case.
    seconds
        For each case, shared by all its kernels.
    every_step
        Also time step 0, the definition.
    kernels
        Files of one's own that register more kernels.
    output
        The CSV file to write, instead of one named after this machine in benchmarks/results.
    """
    own = {k for file in kernels or [] for k in registry.load_file(file)}
    problems = [p for p in registry.problems() if p.name.startswith(group)]
    chosen = [(p, c) for p in problems for c in p.cases if "bench" in c.tags and case in (None, c.name)]
    if not chosen:
        names = sorted({p.name.partition("_")[0] for p in registry.problems()})
        raise ValueError(f"nothing to time for {group!r}" + (f", case {case!r}" if case else "") + f"; groups: {names}")
    threads = get_num_threads()
    torch = load_torch(threads)
    rows = []
    for problem, one in chosen:
        print(f"\n{problem.name}, {one.name}")
        timed = [k for k in registry.kernels(problem.name, "cpu") if every_step or k.step >= FIRST_STEP or k in own]
        for row in _time_case(problem, one, timed, seconds, torch):
            print("  " + _line(row), flush=True)
            rows.append(row)
    print(f"\nwritten to {write(group, rows, threads, output)}")


def _time_case(problem: Any, case: Any, kernels: list, seconds: float, torch: Any) -> Iterator[dict[str, Any]]:
    trial = Trial(problem, case, "float32")
    layouts = {name: "contiguous" if name == "w" else "channels_last" for name in trial.arrays}
    arrays = {name: None if a is None else lay_out(a, layouts[name])[0] for name, a in trial.arrays.items()}
    competing = [k for k in kernels if trial.suits(k)]
    calls, worst, wrong = {}, {}, {}
    for k in competing:
        try:
            worst[k.name] = trial.compare(trial.run(k, "channels_last"), k)
        except Wrong as error:
            wrong[k.name] = f"{error.failure}: {error}"
            continue
        calls[k.name] = lambda k=k: k(*arrays.values(), **trial.params)
    theirs = torch and peer(torch, problem.name, arrays, trial.params)
    if theirs:
        calls[PEER] = theirs
    times = in_turn(calls, seconds, pause=0.003) if calls else {}
    work, moved = (count(*arrays.values(), **trial.params) for count in (problem.flops, problem.bytes_moved))
    steps = {k.name: k.step for k in competing}
    for name, t in times.items():
        yield {
            "problem": problem.name,
            "case": case.name,
            "kernel": name,
            "step": steps.get(name, ""),
            "verdict": "right" if name in worst else "",
            "worst_eps": f"{worst[name]:.3g}" if name in worst else "",
            "n": t.n,
            "median_ms": f"{t.median * 1e3:.4g}",
            "p20_ms": f"{t.p20 * 1e3:.4g}",
            "p80_ms": f"{t.p80 * 1e3:.4g}",
            "gflop_per_s": f"{work / t.median / 1e9:.4g}",
            "gbyte_per_s": f"{moved / t.median / 1e9:.4g}",
            "times_torch": f"{times[PEER].median / t.median:.3g}" if PEER in times else "",
        }
    for name, verdict in wrong.items():
        columns = ("n", "median_ms", "p20_ms", "p80_ms", "gflop_per_s", "gbyte_per_s", "times_torch")
        which = {"problem": problem.name, "case": case.name, "kernel": name, "step": steps[name]}
        yield which | {"verdict": verdict, "worst_eps": ""} | dict.fromkeys(columns, "")


def _line(row: dict[str, Any]) -> str:
    if not row["n"]:
        return f"{row['kernel']:24} not timed, {row['verdict']}"
    speed = f"{row['median_ms']:>8} ms {row['gflop_per_s']:>7} GFLOP/s {row['gbyte_per_s']:>7} GB/s"
    return f"{row['kernel']:24} {speed}" + (f"  {row['times_torch']} x torch's speed" if row["times_torch"] else "")
