"""The README's tables of speeds, made from the results files: `python -m benchmarks readme` rewrites them."""

from __future__ import annotations

import re
from pathlib import Path

from .gpu_layers import ladder
from .kernels import by_direction, plain_3x3
from .networks import OURS
from .provenance import RESULTS, read

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- speeds: made by `python -m benchmarks readme` -->", "<!-- end of speeds -->"
GPU_FILES = ("networks", "conv2d")  # how their names begin
_WHAT = {"train": "training step", "infer": "inference"}
Row = dict[str, str]


def readme(*, check: bool = False) -> int:
    """Write the tables of speeds into README.md.

    Parameters
    ----------
    check
        Write nothing; exit code 1 where they are not those of the results files.
    """
    text = README.read_text(encoding="utf-8")
    new = replaced(text, tables())
    if check:
        print("README.md is up to date" if text == new else "README.md is not: run python -m benchmarks readme")
        return int(text != new)
    README.write_text(new, encoding="utf-8")
    print(f"written: {README}")
    return 0


def replaced(text: str, between: str) -> str:
    """The text with what stands between the two marks replaced. ValueError where a mark is missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no line {BEGIN!r} followed by {END!r}")
    return f"{before}{BEGIN}\n{between}\n{END}{after}"


def tables(results: Path = RESULTS) -> str:
    """All tables as Markdown, by machine."""
    parts = []
    for file in sorted(results.glob("networks-*t.csv")):
        if not file.name.startswith("networks-memory"):
            parts += [_machine(read(file)), _networks(read(file))]
    for file in sorted(results.glob("networks-memory-*t.csv")):
        parts += [_machine(read(file)), _memory(read(file))]
    for file in sorted(results.glob("conv2d-*t.csv")):
        parts += [_machine(read(file)), _convolutions(read(file))]
    networks, ladders = ([f for f in sorted(results.glob(f"{name}-*.csv")) if _of_a_gpu(f)] for name in GPU_FILES)
    parts += [_on_gpu(read(file)) for file in networks] + [_ladder(read(file)) for file in ladders]
    if parts and not networks and not ladders:
        parts.append(
            "On a GPU nothing is measured yet: `python -m benchmarks networks --device cuda` makes the table of whole "
            "networks, `conv2d --device cuda` the ladder's."
        )
    return "\n" + "\n\n".join(parts) + "\n" if parts else "\nNothing is measured yet.\n"


def _machine(rows: list[Row]) -> str:
    def values(*names: str) -> str:
        return ", ".join(sorted({" ".join(row[name] for name in names) for row in rows}))

    packages = [name for name in ("numpy", "numba", "torch", "onnxruntime", "openvino") if rows[0][name]]
    versions = ", ".join(f"{name} {values(name)}" for name in packages)
    return f"{values('cpu')}, {values('threads')} threads, {values('system')}; {versions}; commit {values('commit')}:"


def _networks(rows: list[Row]) -> str:
    lines = ["| work | minires | best peer | its time | minires / best peer | of floor |", "|---|---|---|---|---|---|"]
    for group in _groups(rows):
        ours = next((row for row in group if row["library"] == OURS), None)
        peer = next((row for row in group if row["best"] == "1"), None)
        if ours is None:
            continue
        work = f"{_name(ours)}, {_WHAT[ours['what']]}, {ours['precision']}"
        cells = [work, f"{ours['median_ms']} ms"]
        cells += [peer["library"], f"{peer['median_ms']} ms", _ratio(peer)] if peer else ["", "", ""]
        lines.append(_cells(*cells, f"{float(ours['of_floor']):.0%}" if ours["of_floor"] else "not measured"))
    return "\n".join(lines)


def _memory(rows: list[Row]) -> str:
    lines = ["| peak memory above the idle process, training | minires | least of a peer | its peak | minires / it |"]
    lines.append("|---|---|---|---|---|")
    for group in _groups(rows):
        ours = next((row for row in group if row["library"] == OURS), None)
        peer = next((row for row in group if row["best"] == "1"), None)
        if ours is not None and peer is not None:
            cells = [f"{_name(ours)}, {ours['precision']}", f"{ours['above_mib']} MiB", peer["library"]]
            lines.append(_cells(*cells, f"{peer['above_mib']} MiB", peer["ratio"]))
    return "\n".join(lines)


def _convolutions(rows: list[Row]) -> str:
    lines = ["| convolutions of, minires / PyTorch's better layout | fprop | dgrad | wgrad |", "|---|---|---|---|"]
    for network, means in by_direction(rows).items():
        lines.append(_cells(network, *(f"{mean:.2f}" if mean else "not measured" for mean in means)))
    plain = plain_3x3(rows)
    if plain is not None:
        lines += ["", f"3x3 at stride 1 of ResNet-18 and -50, all directions: {plain:.2f}. (Geometric means.)"]
    return "\n".join(lines)


def _of_a_gpu(file: Path) -> bool:
    """Whether a results file was measured on a GPU: those of CPUs end in the number of threads."""
    return not re.search(r"-\d+t$", file.stem) and not file.stem.startswith("networks-memory")


def _on_gpu(rows: list[Row]) -> str:
    lines = [f"{rows[0]['gpu']}, driver {rows[0]['driver']}; commit {rows[0]['commit']}:", ""]
    lines += ["| work | minires | images/s | best of PyTorch | images/s | minires / it |", "|---|---|---|---|---|---|"]
    for group in _groups(rows):
        ours = next((row for row in group if row["library"].startswith(OURS)), None)  # the fastest stands first
        peer = next((row for row in group if row["best"] == "1"), None)
        if ours is None:
            continue
        cells = [f"{_name(ours)}, {_WHAT[ours['what']]}, {ours['precision']}", ours["library"], ours["images_per_s"]]
        theirs = (
            [peer["library"], peer["images_per_s"], f"**{float(ours['over_best_peer']):.2f}**"] if peer else [""] * 3
        )
        lines.append(_cells(*cells, *theirs))
    return "\n".join(lines)


def _ladder(rows: list[Row]) -> str:
    where = next((row for row in rows if row["cudnn"]), rows[0])
    lines = [f"{where['gpu']}, driver {where['driver']}; {where['cudnn']}; commit {where['commit']}:", ""]
    lines += ["| step | kernel, cuDNN's best time / its | fp32 | bf16 |", "|---|---|---|---|"]
    for (step, kernel), means in ladder(rows).items():
        cells = [f"{means[dtype]:.2f}" if dtype in means else "" for dtype in ("float32", "bfloat16")]
        lines.append(_cells(step, kernel, *cells))
    return "\n".join(lines)


def _groups(rows: list[Row]) -> list[list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in ("model", "batch", "size", "what", "precision")), []).append(row)
    return list(groups.values())


def _name(row: Row) -> str:
    return f"{row['model'].replace('resnet', 'ResNet-')}, batch {row['batch']}, {row['size']}x{row['size']}"


def _ratio(row: Row) -> str:
    return (
        f"**{float(row['ratio']):.2f}** ({float(row['ratio_p20']):.2f} to {float(row['ratio_p80']):.2f}, n={row['n']})"
    )


def _cells(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
