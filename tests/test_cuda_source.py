"""CUDA sources compile for every arch that they declare, without a GPU; the cache; what a launch may be."""

import dataclasses
import shutil
import struct
import subprocess
import sys

import minires.kernels  # noqa: F401  (registers)
import numpy as np
import pytest
from minires.kernels import registry
from minires.kernels.checking import Trial
from minires.kernels.cuda import compile as compiler
from minires.kernels.cuda import launch as launches
from minires.kernels.cuda.gpu import choose_arch
from minires.kernels.cuda.launch import ARCHS, Function, Launch, functions
from minires.kernels.cuda.survey import faults, survey
from minires.kernels.memory import empty
from needs import nvrtc

nvrtc()

KERNEL = 'extern "C" __global__ void copy(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }\n'
SPILLS = """
extern "C" __global__ void __launch_bounds__(1024) spills(float* x) {
  float v[96];
  for (int i = 0; i < 96; i++) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int j = 0; j < 96; j++) for (int i = 0; i < 96; i++) x[i] += v[i] * v[j];
}
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIRES_CACHE", str(tmp_path))
    return tmp_path / "cuda"


@pytest.fixture
def source(tmp_path):
    """Write a .cu file and make a Function of it that the survey of all functions does not see."""

    def make(text, entry, **about):
        file = tmp_path / "own.cu"
        file.write_text(text)
        return Function.unlisted(file, entry, **about)

    return make


@pytest.mark.parametrize("file", sorted({f.file for f in functions()}), ids=lambda file: file.stem)
def test_every_kernel_compiles_for_every_arch_without_spills(file):
    found = survey([f for f in functions() if f.file == file])
    assert found
    wrong = [f"{c.function.entry} {c.function.options} {c.arch}: {'; '.join(c.faults)}" for c in found if c.faults]
    assert not wrong, "\n".join(wrong)


TRAINING = """
accumulate adamw_step add_fprop avgpool2d_bwd avgpool2d_fprop batchnorm2d_bwd batchnorm2d_fprop_infer
batchnorm2d_fprop_train conv2d_bias_act conv2d_dgrad conv2d_fprop conv2d_wgrad linear_dgrad linear_fprop linear_wgrad
maxpool2d_bwd maxpool2d_fprop relu_bwd relu_fprop sgd_step softmax_cross_entropy_bwd softmax_cross_entropy_fprop unscale
""".split()


@pytest.mark.parametrize("problem", TRAINING)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_case_of_training_has_a_cuda_kernel(problem, dtype):
    """So that no ResNet needs cuBLAS or cuDNN, whatever its shapes."""
    for case in registry.problem(problem).cases:
        if "test" in case.tags:
            trial = Trial(registry.problem(problem), case, dtype)
            assert any(trial.suits(k) for k in registry.kernels(problem, "cuda")), case.name


def test_every_function_has_a_source_of_its_own_entry():
    for f in functions():
        assert 'extern "C" __global__ void' in f.file.read_text() and f"{f.entry}(" in f.file.read_text()
        assert set(f.archs) <= {*ARCHS, "sm_90a"}


def test_a_cubin_is_a_whole_elf_file(cache):
    cubin = compiler.compile_cubin(KERNEL, "copy.cu", "sm_80")
    sections, size, count = struct.unpack_from("<Q", cubin.code, 40)[0], *struct.unpack_from("<HH", cubin.code, 58)
    assert cubin.code[:4] == b"\x7fELF" and len(cubin.code) >= sections + size * count
    assert cubin.path is not None and cubin.path.read_bytes() == cubin.code
    usage = cubin.usage["copy"]
    assert 0 < usage.registers < 32 and usage.spill_stores == usage.shared == 0


def test_the_cache_is_used_and_a_damaged_entry_is_rebuilt(cache, monkeypatch):
    first = compiler.compile_cubin(KERNEL, "copy.cu", "sm_80")
    runs = []
    compile_now = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda *a: runs.append(a) or compile_now(*a))
    assert compiler.compile_cubin(KERNEL, "copy.cu", "sm_80") == first and not runs
    first.path.write_bytes(first.code[: len(first.code) // 2])
    assert compiler.compile_cubin(KERNEL, "copy.cu", "sm_80") == first and len(runs) == 1
    first.path.with_suffix(".json").write_text("{")
    assert compiler.compile_cubin(KERNEL, "copy.cu", "sm_80") == first and len(runs) == 2


@pytest.mark.parametrize("other", [{"source": KERNEL + "\n"}, {"arch": "sm_86"}, {"options": ("-DX=1",)}])
def test_the_cache_knows_source_arch_and_options_apart(cache, other):
    about = dict(source=KERNEL, name="copy.cu", arch="sm_80", options=())
    assert compiler.compile_cubin(**about).path != compiler.compile_cubin(**about | other).path


def test_the_cache_notices_an_edit_in_a_header(cache, tmp_path, monkeypatch):
    include = shutil.copytree(compiler.INCLUDE, tmp_path / "include")
    monkeypatch.setattr(compiler, "INCLUDE", include)
    file = tmp_path / "uses.cu"
    file.write_text('#include "own.cuh"\n' + KERNEL)
    (include / "own.cuh").write_text("// one\n")
    one = compiler.compile_cubin(compiler.whole_source(file), "uses.cu", "sm_80")
    (include / "own.cuh").write_text("// two\n")
    assert compiler.compile_cubin(compiler.whole_source(file), "uses.cu", "sm_80").path != one.path


def test_without_a_place_for_the_cache_it_compiles_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINIRES_CACHE", str(tmp_path / "file"))
    cubin = compiler.compile_cubin(KERNEL, "copy.cu", "sm_80")
    assert cubin.path is None and cubin.code


def test_headers_are_inlined_once_and_errors_name_their_own_line(source, cache):
    f = source('#include "types.cuh"\n#include "types.cuh"\n\nextern "C" __global__ void k(T* x) { x[0] = y; }\n', "k")
    text = compiler.whole_source(f.file)
    assert text.count("struct bf16") == 1
    with pytest.raises(compiler.CompileError, match=r'own.cu does not compile .*own\.cu\(4\): error.*"y"') as caught:
        f.cubin("sm_80")
    assert "\n" not in str(caught.value) and "error" in caught.value.log


def test_a_header_that_is_not_there(source):
    with pytest.raises(ValueError, match=r"own.cu includes 'nowhere.cuh', which .* has not: .*types.cuh"):
        compiler.whole_source(source('#include "nowhere.cuh"\n', "k").file)


@pytest.mark.parametrize(
    "arch, message", [("compute_80", "must be a real arch"), ("sm_20", "compiles no code for sm_20")]
)
def test_archs_that_are_refused(arch, message):
    with pytest.raises(ValueError, match=message):
        compiler.compile_cubin(KERNEL, "copy.cu", arch)


def test_ptx_is_for_the_virtual_arch():
    assert ".target sm_80" in compiler.compile_ptx(KERNEL, "copy.cu", "sm_80")


def test_spills_budgets_and_wrong_entries_are_faults(source, cache):
    (found,) = survey([source(SPILLS, "spills", archs=("sm_80",))])
    assert any("spilled" in fault for fault in found.faults)
    (found,) = survey([source(KERNEL, "copy", archs=("sm_80",), registers=2)])
    assert "2 are its budget" in found.faults[0]
    (found,) = survey([source(KERNEL, "kopy", archs=("sm_80",))])
    assert 'no extern "C" kernel kopy' in found.faults[0]
    (found,) = survey([source("syntax error", "k", archs=("sm_80",))])
    assert found.usage is None and "does not compile" in found.faults[0]


def test_an_advisory_is_a_fault(source, cache):
    text = 'extern "C" __global__ void k() { asm volatile("setmaxnreg.inc.sync.aligned.u32 240;"); }\n'
    (found,) = survey([source(text, "k", archs=("sm_90a",))])
    assert any("setmaxnreg" in fault for fault in found.faults)
    cubin = dataclasses.replace(source(KERNEL, "copy").cubin("sm_80"), advisories=("(C7508) ignored",))
    assert faults(source(KERNEL, "copy"), cubin) == ["(C7508) ignored"]


@pytest.mark.parametrize(
    "archs, device, chosen",
    [
        (ARCHS, 75, "sm_75"),
        (ARCHS, 86, "sm_86"),
        (ARCHS, 87, "sm_86"),  # runs code of its major version
        (ARCHS, 100, "sm_100"),  # newer than the list: compiled for it
        ((*ARCHS, "sm_90a"), 90, "sm_90a"),
        (("sm_80",), 90, "sm_90"),
    ],
)
def test_the_arch_that_a_device_gets(archs, device, chosen):
    function = Function.unlisted(launches.functions()[0].file, "relu_fprop", ("-DNUMBER=float",), archs)
    assert choose_arch(function, device) == chosen


def test_a_device_too_old_for_a_kernel(source):
    with pytest.raises(RuntimeError, match=r"copy is made for sm_80; this GPU is sm_75: choose another kernel"):
        choose_arch(source(KERNEL, "copy", archs=("sm_80",)), 75)


_DENSE = np.zeros(8, np.float32)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(grid=(1, 65536)), r"grid \(1, 65536\) exceeds CUDA's .*smaller batch"),
        (dict(grid=(1, 1, 1, 1)), "grid"),
        (dict(block=(1025,)), "1025,.* threads; CUDA takes 1 to 1024"),
        (dict(block=(0,)), "threads; CUDA takes"),
        (dict(shared=1 << 20), "1048576 bytes of shared memory"),
        (dict(args=(_DENSE[::2],)), r"argument 0, of shape \(4,\) and strides \(8,\), is not C-contiguous"),
        (
            dict(args=(1, np.lib.stride_tricks.as_strided(_DENSE, (1, 1 << 31), (4, 4)))),
            "argument 1 has 2147483648 elem",
        ),
        (dict(args=(_DENSE[1:],)), "argument 0 lies at 0x.*, not aligned to 16"),
    ],
)
def test_launches_that_are_refused(source, change, message):
    function = source(KERNEL, "copy", alignment=16)
    good = dict(function=function, grid=(1,), block=(1,), args=(empty((8,), np.float32),), shared=0)
    ran = []
    with launches.executed_by(ran.append):
        launches.launch(Launch(**good))
        assert len(ran) == 1
        with pytest.raises(ValueError, match=message):
            launches.launch(Launch(**good | change))
        assert len(ran) == 1


def test_an_empty_grid_is_nothing_to_do(source):
    with launches.executed_by(lambda launch: pytest.fail("it ran")):
        launches.launch(Launch(source(KERNEL, "copy"), (0, 3), (32,), ()))


def test_importing_minires_does_not_import_cupy():
    code = "import minires, sys; import minires.kernels.cuda.launch; print('cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
