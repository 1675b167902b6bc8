"""Register tiles and transforms as they are emitted for NEON, on an emulated ARM processor (Unicorn, which is QEMU's).

tests/test_neon.py runs this with MINIRES_SIMD=neon, on any host: Numba's LLVM code is translated for ARM, and computes
in the emulator's memory. What it is asked for takes addresses and counts alone, so that nothing else is needed there.
Prints a line for each function: its name, the largest error over its bound, and vector multiply-adds in its text.
"""

import re

import llvmlite.binding as llvm
import numba
import numpy as np
import unicorn
import unicorn.arm64_const as arm
from minires.kernels.conv2d.winograd import FORMS
from minires.kernels.conv2d.winograd_kernels import INPUT, OUTPUT, transform
from minires.kernels.cpu.jit import FASTMATH
from minires.kernels.cpu.microkernel import ROWS, lanes, multiply_fetching, multiply_pairs_2d, multiply_tile

from minires import bfloat16

MEMORY, SIZE = 1 << 20, 1 << 22  # of the emulator: code from its begin, arrays from the second MiB, stack from its end
END = MEMORY + SIZE - 4096  # what a function returns to
WIDTH = 2 * lanes("float32")
EPSILON = 2.0**-24


def translate(function, *types):
    """The machine code and assembly that LLVM makes of a Python function for ARM."""
    compiled = numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, error_model="numpy", fastmath=FASTMATH)(
        function
    )
    compiled.compile(types)
    text = re.sub(r"target (datalayout|triple) = .*", "", compiled.inspect_llvm(types))
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple("aarch64-unknown-linux-gnu")
    machine = target.create_target_machine(cpu="cortex-a72", opt=3, reloc="static")
    file = llvm.ObjectFileRef.from_data(machine.emit_object(llvm.parse_assembly(text)))
    sections = {(section.name() or b"").decode(): section.data() for section in file.sections()}
    assert ".rela.text" not in sections, "code that refers to other memory"
    return sections[".text"], machine.emit_assembly(llvm.parse_assembly(text))


def run(code, arrays, *numbers):
    """Call code(*addresses of arrays, *numbers), and return the arrays as they are afterwards."""
    processor = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
    processor.mem_map(MEMORY, SIZE)
    processor.mem_write(MEMORY, code)
    places, at = [], MEMORY + (1 << 20)
    for a in arrays:
        processor.mem_write(at, a.tobytes())
        places.append(at)
        at += -(-a.nbytes // 64) * 64 + 64
    processor.reg_write(arm.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # vectors are on
    processor.reg_write(arm.UC_ARM64_REG_SP, END)
    processor.reg_write(arm.UC_ARM64_REG_LR, END)
    for i, number in enumerate([at, at + 64, *places, *numbers]):  # where Numba returns a result, and an exception
        processor.reg_write(arm.UC_ARM64_REG_X0 + i, number)
    processor.emu_start(MEMORY, END)
    assert processor.reg_read(arm.UC_ARM64_REG_X0) == 0, "an exception"
    return [
        np.frombuffer(processor.mem_read(p, a.nbytes), a.dtype).reshape(a.shape)
        for p, a in zip(places, arrays, strict=True)
    ]


def report(name, assembly, found, wanted, bound):
    """wanted, bound: in float64."""
    error = np.max(np.abs(found - wanted) / np.maximum(bound, np.finfo(np.float32).tiny))
    print(name, f"{error:.3g}", len(re.findall(r"\tfml[as]\tv\d+\.4s", assembly)))


def tile(a, b, c, steps, accumulate):
    multiply_tile(a, steps, 1, b, WIDTH, c, WIDTH, steps, accumulate, ROWS, 2, np.float32)


def fetching_tile(a, b, c, steps, accumulate):
    multiply_fetching(a, steps, 1, b, WIDTH, c, WIDTH, steps, accumulate, b, 1, 256, ROWS, 2, np.float32)


def pairs(a, b, c, steps, accumulate):
    multiply_pairs_2d(a, steps, 1, 0, b, WIDTH, 0, c, WIDTH, steps, 1, accumulate, ROWS, 2, np.float32)


def rounded_pairs(a, b, c, steps, accumulate):
    multiply_pairs_2d(a, steps, 1, 0, b, WIDTH, 0, c, WIDTH, steps, 1, accumulate, ROWS, 2, np.uint16)


def check_tiles(rng, steps=37):
    c = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
    a, b = rng.standard_normal((ROWS, steps)).astype(np.float32), rng.standard_normal((steps, WIDTH)).astype(np.float32)
    for function in (tile, fetching_tile):
        code, assembly = translate(function, *[numba.int64] * 4, numba.boolean)
        for accumulate in (0, 1):
            found = run(code, [a, b, np.where(accumulate, c, np.float32(np.nan))], steps, accumulate)[2]
            products, start = a.astype(float) @ b, accumulate * c.astype(float)
            bound = (steps + 1) * EPSILON * (np.abs(a).astype(float) @ np.abs(b) + np.abs(start))
            report(f"{function.__name__}{accumulate}", assembly, found, products + start, bound)
    a, b = (rng.standard_normal(shape).astype(bfloat16) for shape in ((ROWS, steps, 2), (steps, WIDTH, 2)))
    wide = [v.astype(float) for v in (a, b)]
    products = np.einsum("msp,svp->mv", *wide)
    bound = 2 * steps * EPSILON * np.einsum("msp,svp->mv", *map(np.abs, wide))
    code, assembly = translate(pairs, *[numba.int64] * 4, numba.boolean)
    report("pairs", assembly, run(code, [a, b, c], steps, 0)[2], products, bound)
    code, assembly = translate(rounded_pairs, *[numba.int64] * 4, numba.boolean)
    found = run(code, [a, b, c.astype(bfloat16)], steps, 0)[2]
    report("rounded_pairs", assembly, found.astype(float), products, bound + 2.0**-8 * np.abs(products))


def transforming(patch, size, index, sides):
    def apply(source, target, channels):
        transform(
            source, patch * channels, channels, target, size * channels, channels, channels, index, sides,
            np.float32, np.float32,
        )  # fmt: skip

    return apply


def check_transforms(rng, channels=24):
    for patch, form in FORMS.items():
        for name, index, matrix in (("input", INPUT, form.input), ("output", OUTPUT, form.output)):
            size = len(matrix)
            code, assembly = translate(transforming(patch, size, index, form.sides), *[numba.int64] * 3)
            x = rng.standard_normal((patch, patch, channels)).astype(np.float32)
            found = run(code, [x, np.full((size, size, channels), np.nan, np.float32)], channels)[1]
            m = np.array(matrix)
            wanted, scale = (np.einsum("ia,abc,jb->ijc", n, v, n) for n, v in ((m, x), (np.abs(m), np.abs(x))))
            report(f"{name}_{size}x{size}_of_{patch}x{patch}", assembly, found, wanted, 16 * EPSILON * scale)


if __name__ == "__main__":
    check_tiles(np.random.default_rng(0))
    check_transforms(np.random.default_rng(1))
