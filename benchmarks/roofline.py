"""The convolutions under the machine's two roofs, from a results file: `python -m benchmarks roofline`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .provenance import RESULTS, read

_MARKS = {"conv2d_fprop": "o", "conv2d_dgrad": "s", "conv2d_wgrad": "^"}  # by shape: legible in grey


def roofline(results: Path | None = None, /, *, output: Path | None = None) -> None:
    """Draw FLOP/s over FLOPs per byte of every convolution: ours filled, the faster of PyTorch's layouts hollow.

    Parameters
    ----------
    results
        The file to draw, instead of the newest that `python -m benchmarks conv2d` wrote.
    output
        The picture to write, instead of one beside the results file.
    """
    files = sorted(RESULTS.glob("conv2d-*t.csv"), key=lambda file: file.stat().st_mtime)
    if results is None and not files:
        raise ValueError("there are no results of convolutions: run python -m benchmarks conv2d first")
    file = results or files[-1]
    output = output or file.with_suffix(".png")
    draw(read(file), output)
    print(f"written to {output}")


def draw(rows: list[dict[str, str]], output: Path) -> None:
    """Draw the rows of a results file."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["problem"] in _MARKS and row["median_ms"]]
    if not rows:
        raise ValueError("the results file has no times of convolutions")
    fma = max(float(row["fma_gflop_per_s"]) for row in rows)
    copy = max(float(row["copy_gbyte_per_s"]) for row in rows)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for problem, mark in _MARKS.items():
        ours = [row for row in rows if row["problem"] == problem and row["chosen"] == "1"]
        theirs = [row for row in _best_peers(rows) if row["problem"] == problem]
        name = problem.removeprefix("conv2d_")
        axes.scatter(*_points(theirs), marker=mark, s=45, facecolors="none", edgecolors="0.45", label=f"PyTorch {name}")
        axes.scatter(*_points(ours), marker=mark, s=45, color="black", label=f"minires {name}")
    left, right = 2.0, 1.3 * max(_points(rows)[0])
    x = np.geomspace(left, max(right, 2 * fma / copy), 200)
    axes.plot(x, np.minimum(fma, copy * x), color="black", linewidth=1.2)
    axes.annotate(f"multiply-adds: {fma:.0f} GFLOP/s", (x[-1], fma), (0, 5), textcoords="offset points", ha="right")
    low = 0.8 * min(_points(rows)[1])
    start = max(left, low / copy)
    axes.annotate(f"copy: {copy:.0f} GB/s", (1.15 * start, 1.15 * start * copy), (8, -8), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlim=(left, x[-1]), ylim=(low, 1.5 * fma))
    axes.set(xlabel="FLOPs per byte of inputs and outputs", ylabel="GFLOP/s")
    ticks = [t for t in (10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if low <= t <= 1.5 * fma]
    axes.set_yticks(ticks, [str(t) for t in ticks])
    steps = [t for t in (2, 5, 10, 20, 50, 100, 200, 500, 1000) if left <= t <= x[-1]]
    axes.set_xticks(steps, [str(t) for t in steps])
    axes.minorticks_off()
    axes.set_axisbelow(True)
    axes.grid(color="0.9", linewidth=0.6)
    axes.legend(loc="lower right", ncols=3, fontsize=8)
    where = rows[0]
    networks = ", ".join(dict.fromkeys(row["network"].replace("resnet", "ResNet-") for row in rows if row["network"]))
    title = f"Convolutions of {networks}: {where['cpu']}, {where['threads']} threads, float32"
    axes.set_title(title, fontsize=11)
    figure.savefig(output, dpi=150)


def _points(rows: list[dict[str, str]]) -> tuple[list[float], list[float]]:
    return [float(row["flops"]) / float(row["bytes"]) for row in rows], [float(row["gflop_per_s"]) for row in rows]


def _best_peers(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Of every problem and case, PyTorch's faster layout."""
    best: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        key = row["problem"], row["case"]
        if row["kernel"].startswith("torch") and (
            key not in best or float(row["median_ms"]) < float(best[key]["median_ms"])
        ):
            best[key] = row
    return list(best.values())
