"""`minires study exercise`: what it says to a template, to right solutions and to typical wrong ones."""

from pathlib import Path

import numpy as np
import pytest

from minires.cli import main
from minires.cli.exercise import grade, load, problems
from minires.study.exercises import EXERCISES

RIGHT = {
    "relu": """
        def backward(dy, y):
            return dy * (y > 0)
    """,
    "add": """
        def unbroadcast(dy, shape):
            dy = dy.sum(axis=tuple(range(dy.ndim - len(shape))))
            return dy.sum(axis=tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True)

        def backward(dy, *, a_shape, b_shape):
            return unbroadcast(dy, a_shape), unbroadcast(dy, b_shape)
    """,
    "batch_norm": """
        def backward(dy, x, gamma, mean, inv_std):
            m = x.size / x.shape[1]
            x_hat = (x - mean[:, None, None]) * inv_std[:, None, None]
            dbeta, dgamma = dy.sum((0, 2, 3)), (dy * x_hat).sum((0, 2, 3))
            inner = dy - dbeta[:, None, None] / m - x_hat * dgamma[:, None, None] / m
            return (gamma * inv_std)[:, None, None] * inner, dgamma, dbeta
    """,
    "conv2d": """
        def windows(dy, stride, rs):
            (u, v), (r, s) = stride, rs
            for p in range(dy.shape[2]):
                for q in range(dy.shape[3]):
                    yield dy[:, :, p, q], np.s_[:, :, p * u : p * u + r, q * v : q * v + s]

        def dgrad(dy, w, *, stride, padding, input_hw):
            (a, b), (h, v) = padding, input_hw
            dxp = np.zeros((dy.shape[0], w.shape[1], h + 2 * a, v + 2 * b), dy.dtype)
            for share, window in windows(dy, stride, w.shape[2:]):
                dxp[window] += np.einsum("nk,kcrs->ncrs", share, w)
            return dxp[:, :, a : a + h, b : b + v]

        def wgrad(x, dy, *, stride, padding, kernel_hw):
            (a, b) = padding
            xp = np.pad(x, ((0, 0), (0, 0), (a, a), (b, b)))
            dw = np.zeros((dy.shape[1], x.shape[1], *kernel_hw), dy.dtype)
            for share, window in windows(dy, stride, kernel_hw):
                dw += np.einsum("ncrs,nk->kcrs", xp[window], share)
            return dw
    """,
    "max_pool2d": """
        def backward(dy, indices, *, input_hw):
            (n, c, *_), (h, w) = dy.shape, input_hw
            dx = np.zeros((n, c, h * w), dy.dtype)
            image, channel = np.ogrid[:n, :c]
            np.add.at(dx, (image[..., None, None], channel[..., None, None], indices), dy)
            return dx.reshape(n, c, h, w)
    """,
}
TEXTBOOK_BATCH_NORM = """
    def backward(dy, x, gamma, mean, inv_std):  # through variance and mean, as on most blackboards
        m, axes = x.size / x.shape[1], (0, 2, 3)
        gamma, mean, inv_std = (v[:, None, None] for v in (gamma, mean, inv_std))
        centred, dx_hat = x - mean, dy * gamma
        dvar = (dx_hat * centred).sum(axes)[:, None, None] * -0.5 * inv_std**3
        dmean = -(dx_hat * inv_std).sum(axes)[:, None, None] - 2 * dvar * centred.mean(axes)[:, None, None]
        dx = dx_hat * inv_std + dvar * 2 * centred / m + dmean / m
        return dx, (dy * centred * inv_std).sum(axes), dy.sum(axes)
"""


def changed(name, old, new):
    assert old in RIGHT[name]
    return RIGHT[name].replace(old, new)


WRONG = {  # what: (exercise, function, file, the check that it fails)
    "relu passes at the kink": ("relu", "backward", changed("relu", "y > 0", "y >= 0"), "wrong value"),
    "relu writes into dy": (
        "relu",
        "backward",
        "def backward(dy, y):\n    dy[y <= 0] = 0\n    return dy",
        "input changed",
    ),
    "relu in float64": ("relu", "backward", changed("relu", "dy *", "np.float64(1) * dy *"), "dtype"),
    "relu of x alone": ("relu", "backward", "def backward(dy):\n    return dy", "signature"),
    "add forgets the broadcast": (
        "add",
        "backward",
        "def backward(dy, *, a_shape, b_shape):\n    return dy, dy",
        "shape",
    ),
    "add takes the mean": ("add", "backward", changed("add", "keepdims=True", "keepdims=True) / (2"), "wrong value"),
    "batch_norm with constant statistics": (
        "batch_norm",
        "backward",
        changed("batch_norm", "dy - dbeta[:, None, None] / m - x_hat * dgamma[:, None, None] / m", "dy"),
        "wrong value",
    ),
    "batch_norm without the mean's term": (
        "batch_norm",
        "backward",
        changed("batch_norm", "- dbeta[:, None, None] / m", ""),
        "wrong value",
    ),
    "dgrad that does not flip": (
        "conv2d",
        "dgrad",
        changed("conv2d", "share, w)", "share, w[..., ::-1, ::-1])"),
        "wrong value",
    ),
    "dgrad that overwrites": ("conv2d", "dgrad", changed("conv2d", "dxp[window] +=", "dxp[window] ="), "wrong value"),
    "dgrad that keeps its padding": (
        "conv2d",
        "dgrad",
        changed("conv2d", "return dxp[:, :, a : a + h, b : b + v]", "return dxp"),
        "shape",
    ),
    "wgrad of the last window": ("conv2d", "wgrad", changed("conv2d", "dw +=", "dw ="), "wrong value"),
    "max_pool2d that overwrites": (
        "max_pool2d",
        "backward",
        changed(
            "max_pool2d",
            "np.add.at(dx, (image[..., None, None], channel[..., None, None], indices), dy)",
            "dx[image[..., None, None], channel[..., None, None], indices] = dy",
        ),
        "wrong value",
    ),
    "max_pool2d through memory": (
        "max_pool2d",
        "backward",
        """
        def backward(dy, indices, *, input_hw):
            (n, c, *_), (h, w) = dy.shape, input_hw
            dx = np.zeros((n, c, h * w), dy.dtype)
            flat = np.lib.stride_tricks.as_strided(dy, (dy.size,), (dy.itemsize,))
            np.add.at(dx.reshape(n * c, -1), (np.arange(n * c).repeat(dy[0, 0].size), indices.ravel()), flat)
            return dx.reshape(n, c, h, w)
        """,
        "layout",
    ),
}


def write(path, source):
    lines = source.strip("\n").splitlines()
    cut = len(lines[0]) - len(lines[0].lstrip())
    path.write_text("import numpy as np\n\n\n" + "\n".join(line[cut:] for line in lines) + "\n")
    return path


def results(exercise, source, path):
    written = load(write(path, source), EXERCISES[exercise].functions)
    return {
        f: [grade(written[f], problem, case) for case in problem.cases] for f, problem in problems(exercise).items()
    }


@pytest.mark.parametrize("name", EXERCISES)
def test_the_template_is_handed_out_and_is_not_written_yet(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["study", "exercise", name]) == 0
    path = tmp_path / "runs/study/exercises" / f"{name}.py"
    assert path.read_text() == EXERCISES[name].template
    said = capsys.readouterr().out
    assert f"minires study exercise {name} --hint 1" in said and str(path.relative_to(tmp_path)) in said
    assert main(["study", "exercise", name]) == 1
    said = capsys.readouterr().out
    assert said.count("not written yet (NotImplementedError: write me)") == len(EXERCISES[name].functions)
    assert path.read_text() == EXERCISES[name].template


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_solution_passes(name, tmp_path, capsys):
    path = write(tmp_path / "mine.py", RIGHT[name])
    assert main(["study", "exercise", name, "--file", str(path)]) == 0
    said = capsys.readouterr().out
    assert "All right" in said and "minires/ops/" in said
    cases = sum(len(problem.cases) for problem in problems(name).values())
    assert said.count("right (") == cases >= 3 * len(EXERCISES[name].functions)


def test_another_right_way(tmp_path):
    for found in results("batch_norm", TEXTBOOK_BATCH_NORM, tmp_path / "mine.py")["backward"]:
        assert all(r.ok for r in found), str(found[-1])


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_solution_fails_by_the_right_name(what, tmp_path, capsys):
    name, function, source, failure = WRONG[what]
    graded = results(name, source, tmp_path / "mine.py")
    failed = {f: [r.failure for found in each for r in found if not r.ok] for f, each in graded.items()}
    assert failed.pop(function)[0] == failure and not any(failed.values())
    assert main(["study", "exercise", name, "--file", str(tmp_path / "mine.py")]) == 1
    said = capsys.readouterr().out
    assert f"  {failure}: " in said and f"minires study exercise {name} --hint 1" in said and "All right" not in said


def test_how_much_a_wrong_value_is_off_is_said(tmp_path, capsys):
    path = write(tmp_path / "mine.py", WRONG["relu passes at the kink"][2])
    main(["study", "exercise", "relu", "--file", str(path)])
    said = capsys.readouterr().out
    tutorial = (Path(__file__).parent.parent / "docs/tutorial.md").read_text(encoding="utf-8")
    shown = [line.strip() for line in tutorial.splitlines() if "first failure" in line or "instead of" in line]
    assert [line for line in shown if line.startswith(("The first failure", "wrong value"))] == [
        line.strip() for line in said.splitlines() if line.strip().startswith(("The first failure", "wrong value:"))
    ]
    assert "instead of 0.0 at" in said and "allowed" in said and "It was called with dy (" in said


def test_wrong_outputs_are_named(tmp_path, capsys):
    path = write(tmp_path / "mine.py", RIGHT["batch_norm"].replace("dgamma, dbeta\n    ", "dgamma, 2 * dbeta\n    "))
    assert main(["study", "exercise", "batch_norm", "--file", str(path)]) == 1
    assert "  wrong value: dbeta: " in capsys.readouterr().out


def test_where_an_exception_came_from_is_said(tmp_path, capsys):
    path = write(tmp_path / "mine.py", "def backward(dy, y):\n    return dy * z")
    assert main(["study", "exercise", "relu", "--file", str(path)]) == 1
    said = capsys.readouterr().out
    assert f"raised: NameError: name 'z' is not defined ({path}, line 5)" in said


def test_a_second_edit_within_a_second_is_seen(tmp_path):
    path = tmp_path / "mine.py"
    write(path, changed("relu", "y > 0", "y < 0"))
    assert load(path, ("backward",))["backward"](np.ones(1), np.ones(1)) == 0
    write(path, RIGHT["relu"])
    assert load(path, ("backward",))["backward"](np.ones(1), np.ones(1)) == 1


@pytest.mark.parametrize("name", EXERCISES)
def test_hints(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i, hint in enumerate(EXERCISES[name].hints, 1):
        assert main(["study", "exercise", name, "--hint", str(i)]) == 0
        assert capsys.readouterr().out == f"hint {i} of 3: {hint}\n"
    assert not list(tmp_path.iterdir())


def test_without_a_name_they_are_listed(capsys):
    assert main(["study", "exercise"]) == 0
    said = capsys.readouterr().out
    assert all(name in said and known.task in said for name, known in EXERCISES.items())


@pytest.mark.parametrize(
    "arguments, source, says",
    [
        (["softmax"], None, "there is no exercise 'softmax'; there are relu, add"),
        (["relu", "--hint", "4"], None, "no hint 4: there are 1 to 3"),
        (["relu", "--hint", "0"], None, "no hint 0"),
        (["relu"], "def forward(x):\n    return x", "has no function backward"),
        (["relu"], "backward = 3", "has no function backward"),
        (["relu"], "def backward(dy, y)\n    return dy", "line 4: expected ':'"),
        (["relu"], "import no_such_library", "cannot be run: ModuleNotFoundError: No module named 'no_such_library'"),
        (["relu"], "raise SystemExit(5)", "cannot be run: SystemExit: 5"),
    ],
)
def test_bad_input_is_one_line(arguments, source, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if source is not None:
        arguments = [*arguments, "--file", str(write(tmp_path / "mine.py", source))]
    assert main(["study", "exercise", *arguments]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and said.startswith("minires: error: ")


def test_files_that_cannot_be_read(tmp_path, capsys):
    binary = tmp_path / "mine.py"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, binary):
        assert main(["study", "exercise", "relu", "--file", str(path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_nothing_is_registered(tmp_path):
    from minires.kernels import registry

    before = registry.kernels()
    results("relu", RIGHT["relu"], tmp_path / "mine.py")
    assert registry.kernels() == before
