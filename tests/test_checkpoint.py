"""Checkpoint files: exact, whole or absent, never believed when damaged."""

import os
import resource
import stat
import subprocess
import sys

import numpy as np
import pytest

import minires
from minires.serialization import load_arrays, save
from minires.train.checkpoint import Checkpoints, DamagedCheckpoint, read_checkpoint, sweep, write_checkpoint

RNG = np.random.default_rng(0)
ARRAYS = {
    "c": RNG.standard_normal((3, 4)).astype(np.float32),
    "channels last": RNG.standard_normal((2, 5, 5, 3)).astype(np.float32).transpose(0, 3, 1, 2),
    "strided": RNG.standard_normal((6, 8))[::2, ::-3],
    "broadcast": np.broadcast_to(np.float32(2.5), (3, 2)),
    "scalar": np.array(7, np.int64),
    "empty": np.zeros((0, 3), np.float32),
    "odd": np.array([np.nan, -0.0, np.inf, 5e-324]),
}
STATE = {"step": 3, "loss": 0.1 + 0.2, "random": 2**120 + 1, "nothing": None, "text": "ü\n"}


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_arrays_and_state_come_back_bit_for_bit(tmp_path):
    path = tmp_path / "step.safetensors"
    write_checkpoint(path, ARRAYS, STATE)
    arrays, state = read_checkpoint(path)
    assert state == STATE and arrays.keys() == ARRAYS.keys()
    assert all(same(arrays[name], ARRAYS[name]) for name in ARRAYS)
    assert [p.name for p in tmp_path.iterdir()] == ["step.safetensors"]


def test_every_safetensors_reader_can_read_it(tmp_path):
    from safetensors.numpy import load_file

    write_checkpoint(tmp_path / "step.safetensors", ARRAYS, STATE)
    loaded = load_file(tmp_path / "step.safetensors")
    assert all(same(loaded[name], ARRAYS[name]) for name in ARRAYS)


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    """Whatever bit of the file is flipped: an error, or (blanks of the head) the very same contents."""
    path = tmp_path / "step.safetensors"
    write_checkpoint(path, {"w": ARRAYS["c"]}, STATE)
    whole = path.read_bytes()
    same_anyway = 0
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            arrays, state = read_checkpoint(path)
        except DamagedCheckpoint:
            continue
        assert same(arrays["w"], ARRAYS["c"]) and state == STATE
        same_anyway += 1
    assert same_anyway < 8 * 16


def test_no_cut_goes_unnoticed(tmp_path):
    path = tmp_path / "step.safetensors"
    write_checkpoint(path, {"w": ARRAYS["c"]}, STATE)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedCheckpoint, match="is damaged"):
            read_checkpoint(path)


def test_a_file_of_weights_is_no_checkpoint(tmp_path):
    save({"w": ARRAYS["c"]}, tmp_path / "w.safetensors")
    with pytest.raises(DamagedCheckpoint, match="no checkpoint"):
        read_checkpoint(tmp_path / "w.safetensors")


def fill(folder, steps, keep=2, best=-1):
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, {"w": np.full(3, step)}, {"step": step}, best=best)
    return checkpoints


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (1, -1, [50]),
        (2, -1, [40, 50]),
        (2, 20, [20, 40, 50]),
        (4, 10, [10, 20, 30, 40, 50]),
        (9, -1, [10, 20, 30, 40, 50]),
    ],
)
def test_the_last_ones_and_the_best_stay(tmp_path, keep, best, left):
    assert fill(tmp_path / "c", range(10, 60, 10), keep, best).steps() == left


def test_a_best_that_was_beaten_goes(tmp_path):
    checkpoints = fill(tmp_path / "c", (1, 2, 3), 1, best=1)
    assert checkpoints.steps() == [1, 3]
    checkpoints.save(4, {}, {}, best=4)
    assert checkpoints.steps() == [4]


def test_the_newest_is_loaded(tmp_path):
    assert Checkpoints(tmp_path / "none").load() is None
    checkpoint = fill(tmp_path / "c", (9, 10, 100)).load()
    assert checkpoint is not None and checkpoint.state == {"step": 100}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.write_bytes(data)


def swap(path):
    path.write_bytes(path.with_name("step-00000010.safetensors").read_bytes()[:-4] + b"\1\1\1\1")


@pytest.mark.parametrize("damage", [truncate, flip, swap, lambda path: path.write_bytes(b"")])
def test_a_damaged_one_falls_back_to_the_one_before(tmp_path, damage):
    checkpoints = fill(tmp_path / "c", (10, 20, 30), keep=3)
    for step, falls_to in ((30, 20), (20, 10)):
        damage(checkpoints.path(step))
        notes = []
        checkpoint = checkpoints.load(notes.append)
        assert checkpoint is not None and checkpoint.state == {"step": falls_to}
        assert len(notes) == 1 and "damaged" in notes[0] and f"going back to step {falls_to}" in notes[0]
        assert "\n" not in notes[0] and checkpoints.path(step).with_suffix(".damaged").exists()
    checkpoints.path(10).write_bytes(b"{")
    with pytest.raises(DamagedCheckpoint, match="there is no earlier one"):
        checkpoints.load()


def test_what_a_killed_process_left_is_swept(tmp_path):
    checkpoints = fill(tmp_path / "checkpoints", (1,))
    for stale in (tmp_path / ".metrics.csv.tmp-77", tmp_path / "checkpoints" / ".step-00000002.safetensors.tmp-78"):
        stale.write_bytes(b"half")
    (tmp_path / ".hidden").write_text("the user's")
    sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == [".hidden", "checkpoints", "step-00000001.safetensors"]
    assert checkpoints.steps() == [1]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_the_umask_decides_who_may_read(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_checkpoint(tmp_path / "c.safetensors", ARRAYS, STATE)
        minires.save({"w": minires.zeros(3)}, tmp_path / "w.safetensors")
    finally:
        os.umask(before)
    for name in ("c", "w"):
        assert stat.S_IMODE((tmp_path / f"{name}.safetensors").stat().st_mode) == 0o666 & ~umask


def test_file_and_folder_reach_the_disk_in_order(tmp_path, monkeypatch):
    """fsync of the file, then its move, then fsync of the folder."""
    calls = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        real_fsync(descriptor)

    def replace(a, b):
        calls.append("move")
        real_replace(a, b)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_checkpoint(tmp_path / "c.safetensors", ARRAYS, STATE)
    assert calls == ["file", "move", "folder"]


def test_a_full_disk_loses_nothing(tmp_path):
    checkpoints = fill(tmp_path / "c", (1, 2))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoints.save(3, {"w": np.zeros(10_000)}, {"step": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == [
        "step-00000001.safetensors",
        "step-00000002.safetensors",
    ]
    loaded = checkpoints.load()
    assert loaded is not None and loaded.state == {"step": 2}


def test_metadata_of_saved_weights(tmp_path):
    save({"w": ARRAYS["c"]}, tmp_path / "w.safetensors", {"made by": "a test"})
    assert load_arrays(tmp_path / "w.safetensors")[1] == {"made by": "a test"}
    save({"w": ARRAYS["c"]}, tmp_path / "w.safetensors")
    assert load_arrays(tmp_path / "w.safetensors")[1] == {}


NURSERY = """
import os, random, signal, sys, time
from pathlib import Path
import numpy as np
from minires.train.checkpoint import Checkpoints, sweep

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
random.seed(0)
lost = torn = survived = 0
for kill in range(kills):
    told, tell = os.pipe()
    before = Checkpoints(folder / "checkpoints").steps()
    child = os.fork()
    if child == 0:
        checkpoints = Checkpoints(folder / "checkpoints", keep=2)
        step = max(before, default=0)
        while True:
            step += 1
            checkpoints.save(step, {"w": np.full(200_000, step), "v": np.full((50, 3), -step)}, {"step": step})
            os.write(tell, step.to_bytes(8, "little"))
    os.close(tell)
    os.read(told, 8)                                    # it writes: let it write on for a moment
    time.sleep(random.random() * 0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(told, "rb") as pipe:
        heard = pipe.read()
    done = int.from_bytes(heard[-8:], "little") if heard else max(before, default=0) + 1
    stale = list((folder / "checkpoints").glob(".*.tmp-*"))
    torn += bool(stale)
    survived += 1
    checkpoints, notes = Checkpoints(folder / "checkpoints"), []
    checkpoint = checkpoints.load(notes.append)
    step = checkpoint.state["step"]
    right = (checkpoint.arrays["w"] == step).all() and (checkpoint.arrays["v"] == -step).all()
    lost += bool(notes) or step < done or not right or len(checkpoints.steps()) > 3
    sweep(folder)
print(survived, lost, torn)
"""


def test_a_hundred_kills_while_writing_lose_nothing(tmp_path):
    """A process that does nothing but write checkpoints, killed at random moments: what it said it had written is
    there, whole. Some kills must have hit a half-written file, else this test has tested nothing."""
    done = subprocess.run(
        [sys.executable, "-c", NURSERY, str(tmp_path), "100"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    survived, lost, torn = map(int, done.stdout.split())
    assert (survived, lost) == (100, 0) and torn > 10
    assert not list((tmp_path / "checkpoints").glob(".*"))
