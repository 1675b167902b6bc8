"""The interpreter against what hardware answered: the golden outputs in the reports of `benchmarks/results`."""

import json
from pathlib import Path

import numpy as np
import pytest
from minires.kernels.cuda.launch import executed_by
from minires.kernels.interpreter import interpret

from benchmarks import gpu_primitives
from benchmarks.gpu_hopper import HOPPER, Product, Tile
from benchmarks.gpu_primitives import PRIMITIVES, difference, drawn, golden, interpreted, not_hopper, primitives

REPORTS = sorted((Path(__file__).parent.parent / "benchmarks" / "results").glob("gpu-*.jsonl"))


def test_the_interpreter_answers_as_hardware_did():
    found = 0
    for report in REPORTS:
        for line in map(json.loads, report.read_text().splitlines()):
            for name, primitive, answer in golden(line) if line["unit"].startswith("primitives/") else ():
                found += 1
                off = difference(primitive, interpreted(primitive, drawn(primitive)), answer)
                assert off <= primitive.allowed, f"{name} on {line['gpu']}"
    if not found:
        pytest.skip("no report of a GPU lies in benchmarks/results yet")


@pytest.fixture
def compiler():
    """Primitives of Hopper are CUDA C++, for NVRTC."""
    pytest.importorskip("cupy", reason="CuPy is not installed: pip install 'minires[cuda]'")
    from minires.kernels.cuda import compile

    try:
        compile.supported_archs()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("group", PRIMITIVES)
def test_every_primitive_answers_something(group, monkeypatch, request):
    """With the interpreter in the hardware's place: the rows are golden outputs that it stands up to."""
    if group in HOPPER:
        request.getfixturevalue("compiler")
    monkeypatch.setattr(gpu_primitives, "on_device", interpreted)
    monkeypatch.setattr(gpu_primitives, "not_hopper", lambda: "")
    rows = list(primitives(group))
    assert [row["primitive"] for row in rows] == list(PRIMITIVES[group])
    for name, primitive, answer in golden({"rows": json.loads(json.dumps(rows))}):
        assert len(np.unique(answer)) > 3 or name in ("vote.ballot", "TMA 4D, none of it inside"), name
        assert not any("nan" in repr(row["difference"]) for row in rows)
        assert np.array_equal(answer, interpreted(primitive, drawn(primitive)))


def test_hardware_that_answers_otherwise_fails_the_unit(monkeypatch):
    """The planted faults: one bit of a result; a sum that is rounded more than is allowed."""

    def flipped(primitive, words):
        answer = interpreted(primitive, words)
        answer[7, 0] ^= 1
        return answer

    monkeypatch.setattr(gpu_primitives, "on_device", flipped)
    with pytest.raises(RuntimeError, match=r"not like the hardware in mul\.hi\.u64, .*lop3"):
        list(primitives("integers"))
    one = PRIMITIVES["matrices"]["mma bf16, rounding"]
    right = interpreted(one, drawn(one))
    assert difference(one, flipped(one, drawn(one)), right) <= one.allowed
    wrong = (right.view(np.float32) * np.float32(1 + 2**-12)).view(np.uint32)
    assert difference(one, wrong, right) > one.allowed


@pytest.mark.parametrize("name", HOPPER["tiles"])
def test_tiles_are_boxes_with_zeros_around_in_swizzled_rows(name, compiler):
    """Indexed by hand; the swizzle as figures draw it: units of 16 bytes of a row exchanged by the row's number."""
    one: Tile = HOPPER["tiles"][name]
    tensor = drawn(one)
    steps = (one.steps or (1,) * len(one.box))[::-1]
    box = np.zeros(one.box[::-1], np.uint16)
    for at in np.ndindex(*box.shape):
        there = tuple(begin + i * step for begin, i, step in zip(one.at[::-1], at, steps, strict=True))
        if all(0 <= i < size for i, size in zip(there, tensor.shape, strict=True)):
            box[at] = tensor.view(np.uint16)[there]
    lines = box.reshape(-1, one.box[0])
    if one.swizzle != "none":
        width = int(one.swizzle[:-1])  # bytes; the tile's rows are as long
        assert lines.shape[1] * 2 == width
        units, repeats = width // 16, 128 // width  # rows that share a number
        for i, line in enumerate(lines.copy()):
            exchanged = np.arange(units) ^ (i // repeats % units)
            lines[i].reshape(units, 8)[exchanged] = line.reshape(units, 8)
    assert np.array_equal(interpreted(one, tensor), lines.reshape(-1).view(np.uint32))


@pytest.mark.parametrize("name", HOPPER["warpgroups"])
def test_products_are_products(name, compiler):
    one: Product = HOPPER["warpgroups"][name]
    numbers = drawn(one)
    a, b = (part[:, : 16 * one.times].astype(np.float64) for part in (numbers[:64], numbers[64:]))
    d = interpreted(one, numbers).view(np.float32).reshape(one.columns // 8, 2, 2, 4, 8, 4)
    # of (j, lower, right, warp, group, quad): row 16 warp + 8 lower + group, column 8 j + 2 quad + right
    d = d.transpose(3, 1, 4, 0, 5, 2).reshape(64, one.columns)
    np.testing.assert_allclose(d, a @ b.T, rtol=0, atol=1e-4 if not one.whole else 0)


def test_numbers_pass_through_the_ring(compiler):
    one = HOPPER["barriers"]["mbarrier phases"]
    assert np.array_equal(interpreted(one, drawn(one)), np.roll(drawn(one), -1, axis=1))


def test_primitives_of_hopper_compile_without_advisories(compiler):
    functions = {
        one.function if not isinstance(one, Product) else one.function() for g in HOPPER.values() for one in g.values()
    }
    for function in functions:
        cubin = function.cubin("sm_90a")
        assert not cubin.advisories and not any(use.spill_stores for use in cubin.usage.values()), function


def test_hopper_is_asked_where_it_is(compiler, monkeypatch):
    """From arrays of the device, through launches; elsewhere the group is skipped, with the reason."""
    import device_double

    launched = device_double.install(monkeypatch)
    monkeypatch.setattr(device_double._Device, "compute_capability", "86", raising=False)
    assert list(primitives("tiles")) == [
        {"group": "tiles", "skipped": "sm_90a needs compute capability 9.0, this GPU has 8.6"}
    ]
    assert not launched and not_hopper()
    monkeypatch.setattr(device_double._Device, "compute_capability", "90")

    def on_host(primitive, words):
        with executed_by(interpret):  # the stand-in takes no arrays of the host's
            return interpreted(primitive, words)

    monkeypatch.setattr(gpu_primitives, "interpreted", on_host)
    for group in HOPPER:
        assert all(row["difference"] == 0 for row in primitives(group))
    assert len(launched) >= sum(map(len, HOPPER.values()))


def test_a_tile_that_is_swizzled_otherwise_fails_the_unit(compiler, monkeypatch):
    """The planted fault: hardware whose swizzle of 128 bytes is that of 64."""

    def other(primitive, words):
        answer = interpreted(primitive, words)
        if isinstance(primitive, Tile) and primitive.swizzle == "128B":
            answer = answer.reshape(-1, 8, 4)[:, ::-1].reshape(-1)
        return answer

    monkeypatch.setattr(gpu_primitives, "on_device", other)
    monkeypatch.setattr(gpu_primitives, "not_hopper", lambda: "")
    with pytest.raises(RuntimeError, match="not like the hardware in TMA 2D, TMA 2D, outside on all sides, TMA 3D"):
        list(primitives("tiles"))
