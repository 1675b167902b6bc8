"""A CUDA kernel of one's own, outside the tree: `minires kernels check FILE.cu`, interpreted."""

import pytest
from minires.kernels import registry
from minires.kernels.cuda.launch import functions
from needs import nvrtc

from minires.cli import main

nvrtc()

RELU = """/* minires: relu_fprop
y = empty(x.shape)
my_relu[cdiv(x.size, 128), 128](dense(x), y, x.size)
return y
*/
extern "C" __global__ void my_relu(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i] <= 0 ? 0 : x[i];
}
"""
CONV = """/* minires: conv2d_dgrad
N, K, P, Q = dy.shape
if groups > 1 or stride != (1, 1) or padding != (0, 0) or dilation != (1, 1):
    raise NotImplementedError
C, R, S = w.shape[1:]
dx, memory = empty_nhwc(N, C, *input_hw)
scatter[(N, cdiv(C, 32)), (32,)](to_nhwc(dy), dense(w), memory, N, *input_hw, C, K, P, Q, R, S)
return dx
*/
extern "C" __global__ void __launch_bounds__(32)
scatter(const float* dy, const float* w, float* dx, int N, int H, int W, int C, int K, int P, int Q, int R, int S) {}
"""


@pytest.fixture
def check(tmp_path, capsys):
    """Write a file, check it, and return the exit code and what was printed; its kernel is forgotten afterwards."""
    before = {(k.problem.name, k.name) for k in registry.kernels()}

    def run(text, *arguments, name="own.cu"):
        (tmp_path / name).write_text(text)
        code = main(["kernels", "check", str(tmp_path / name), *arguments])
        return code, "".join(capsys.readouterr())

    yield run
    for key in {(k.problem.name, k.name) for k in registry.kernels()} - before:
        registry.forget(*key)


def test_a_right_one(check):
    listed = functions()
    code, said = check(RELU, "--device", "interpret")
    assert code == 0 and "interpreted" in said and "relu_fprop" in said and "own" in said
    assert functions() == listed


def test_an_off_by_one_bound_is_reported(check):
    code, said = check(RELU.replace("i < n", "i <= n"), "--device", "interpret")
    assert code == 1 and "out of bounds" in said, said


def test_one_that_writes_nothing(check):
    code, said = check(CONV, "--device", "interpret")
    assert code == 1 and "unwritten output" in said


def test_a_python_file_with_cuda_kernels(check):
    text = """
from minires.kernels.memory import empty
from minires.kernels.registry import kernel, problem

@kernel(problem("relu_fprop"), device="cuda", step=9, note="array code", dtypes=("float32",))
def relu_of_arrays(x):
    return x * (x > 0) + 0 * x
"""
    code, said = check(text, "--device", "interpret", name="own.py")
    assert code == 0 and "relu_of_arrays" in said


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("minires: relu_fprop", "minires: nothing", "no problem is named 'nothing'; known: accumulate"),
        ("/* minires: relu_fprop", "/*", "does not say what it computes: begin it with /* minires: PROBLEM"),
        ('extern "C"', "", 'has no kernel: declare one as extern "C" __global__ void NAME'),
        ("return y\n", "return y y\n", "the launch in its header is no Python: invalid syntax"),
    ],
)
def test_files_that_are_refused(check, old, new, message):
    code, said = check(RELU.replace(old, new), "--device", "interpret")
    assert code == 2 and message in said and said.count("\n") == 1, said


def test_what_the_compiler_says_is_shown(check):
    code, said = check(RELU.replace("int i =", "int i = j +"), "--device", "interpret")
    assert code == 1 and 'own.cu(7): error: identifier "j" is undefined' in said.replace("\n", " "), said


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--device", "interpret", "--time"), "--time goes with --device cpu, not interpret"),
        (("--device", "cpu"), "own.cu has no CPU kernel"),
    ],
)
def test_other_uses_that_are_refused(check, arguments, message):
    code, said = check(RELU, *arguments)
    assert code == 2 and message in said
