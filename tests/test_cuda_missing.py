"""What is said where something is missing for a GPU: one line with the remedy, and exit code 2."""

import importlib.util
import sys
import types

import pytest
from minires.kernels.cuda import compile as compiler
from needs import nvrtc

import minires
from minires.cli import main
from minires.device import array_module, device


class CUDARuntimeError(Exception):
    """CuPy's own."""


def _raise(error):
    raise error


def _cupy(count=lambda: 1, version=lambda: (13, 0)):
    module = types.ModuleType("cupy")
    module.__spec__ = importlib.util.spec_from_loader("cupy", None)
    runtime = types.SimpleNamespace(getDeviceCount=count)
    module.cuda = types.SimpleNamespace(runtime=runtime, nvrtc=types.SimpleNamespace(getVersion=version))
    return module


_NO_DRIVER = CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient\n(more lines)")
CASES = {
    "no CuPy": (None, "cuda", "CuPy, which is not installed: pip install 'minires[cuda]'"),
    "no driver": (
        _cupy(count=lambda: _raise(_NO_DRIVER)),
        "cuda",
        "an NVIDIA GPU with its driver, and CuPy finds none "
        "(cudaErrorInsufficientDriver: CUDA driver version is insufficient); use 'cpu'",
    ),
    "no GPU": (_cupy(count=lambda: 0), "cuda", "an NVIDIA GPU with its driver, and CuPy finds none; use 'cpu'"),
    "no NVRTC": (
        _cupy(version=lambda: _raise(RuntimeError("libnvrtc.so not found"))),
        "cuda",
        "NVRTC to compile its kernels (RuntimeError): pip install 'minires[cuda]'",
    ),
    "too few GPUs": (_cupy(), "cuda:3", "more GPUs than the 1 that there are: use 'cuda:0'"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_exit_code_2(name, monkeypatch, capsys, tmp_path):
    cupy, where, message = CASES[name]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    if cupy is None:  # as find_spec answers where a package is not installed
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "cupy" else find(n, *a))
    assert main(["train", "--device", where, "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"minires: error: device {device(where)} needs {message}\n"
    assert not (tmp_path / "run").exists()
    assert minires.cuda.is_available() is (name == "too few GPUs")
    with pytest.raises(RuntimeError, match=r"^device cuda"):
        array_module(device(where))


def test_cupy_that_cannot_be_imported(monkeypatch, tmp_path):
    (tmp_path / "cupy.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    with pytest.raises(
        RuntimeError, match=r"needs CuPy, which cannot be imported \(libcudart.so.13: .*\): pip install"
    ):
        array_module(device("cuda"))
    assert not minires.cuda.is_available()


def test_ci_does_not_skip_silently(monkeypatch):
    """Where CuPy is installed and NVRTC is not found, CI fails; elsewhere tests are skipped with the reason."""

    def missing():
        raise RuntimeError("no NVRTC")

    monkeypatch.setattr(compiler, "supported_archs", missing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.skip.Exception, match="no NVRTC"):
        nvrtc()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(RuntimeError, match="no NVRTC"):
        nvrtc()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="no NVRTC"):
        nvrtc()
