"""The loader: batches do not depend on who makes them; positions; errors; and no process stays behind."""

import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from minires.data import DataLoader, Dataset, ImageDataset, default_collate
from minires.data import transforms as T
from minires.data.collate import BatchMaker
from minires.data.randomness import generator, keyed, keyed_batch, sample, uniforms
from minires.data.workers import WorkerPool, _flattened
from minires.engine import Tensor

IMAGES = np.random.default_rng(0).integers(0, 256, (70, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(70) % 10
DIGITS = tuple("0123456789")


def in_memory():
    """Whole batches: crop, flip, cutout; two images a batch are mixed."""
    augment = T.Augment((0.4, 0.5, 0.6), (0.2, 0.3, 0.2), padding=2, flip=True, cutout=3)
    return ImageDataset(IMAGES, LABELS, DIGITS, transform=augment), T.MixUp(10, alpha=0.5)


class Pictures(Dataset):
    """PIL images, one by one, as from a folder."""

    transform = T.Compose(
        [T.RandomCrop(8, 2), T.RandomHorizontalFlip(), T.ColorJitter(0.3, hue=0.2), T.ToTensor(), T.RandomErasing()]
    )

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(IMAGES[index])), int(LABELS[index])


def one_by_one():
    return Pictures(), T.CutMix(10)


def loader(make, workers=0, kind="thread", **options):
    dataset, mix = make()
    settings = {"shuffle": True, "generator": 7, "batch_transform": mix, **options}
    return DataLoader(dataset, 16, num_workers=workers, workers=kind, **settings)


def bits(batches):
    """Everything about the batches that could differ: values, dtypes, order in memory."""
    return [[(f.array.tobytes(), f.dtype, f.shape, f.array.strides) for f in batch] for batch in batches]


# --- the same batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [in_memory, one_by_one])
def test_workers_change_no_batch(make):
    alone = loader(make)
    expected = [bits(alone) for _ in range(2)]  # two epochs
    assert expected[0] != expected[1] and len(expected[0]) == 5
    assert expected[0][0][0][3] == (8 * 8 * 3 * 4, 4, 8 * 3 * 4, 3 * 4)  # channels last
    for kind, workers in (("thread", 1), ("thread", 3), ("process", 1), ("process", 3)):
        with_workers = loader(make, workers, kind, persistent_workers=True)
        assert [bits(with_workers) for _ in range(2)] == expected, (kind, workers)
        with_workers.close()


def test_batch_size_changes_no_image():
    dataset, _ = in_memory()
    whole = next(iter(DataLoader(dataset, 70, generator=3)))[0].array
    parts = np.concatenate([images.array for images, _ in DataLoader(dataset, 9, generator=3)])
    np.testing.assert_array_equal(parts, whole)


def test_images_one_by_one_or_in_a_batch_are_the_same():
    dataset, _ = in_memory()
    batched = dataset.with_transform(T.PerImage(Pictures.transform))
    for a, b in zip(
        DataLoader(batched, 16, True, generator=3), DataLoader(Pictures(), 16, True, generator=3), strict=True
    ):
        np.testing.assert_array_equal(a[0].array, b[0].array)
        np.testing.assert_array_equal(a[1].array, b[1].array)


def test_prefetch_factor_changes_no_batch():
    expected = bits(loader(in_memory))
    for factor in (1, 5):
        assert bits(loader(in_memory, 2, prefetch_factor=factor)) == expected


# --- numbers ------------------------------------------------------------------------------------------------------


def test_uniforms_belong_to_the_sample():
    def drawn(indices, epoch=0, seed=1):
        with keyed_batch(seed, epoch, 0, np.array(indices)):
            return uniforms(len(indices), 3), uniforms(len(indices), 2)

    (a, b), (c, d) = drawn([4, 9, 2]), drawn([2, 4])
    np.testing.assert_array_equal(a[[2, 0]], c)
    np.testing.assert_array_equal(b[[2, 0]], d)
    everything = np.concatenate([a.ravel(), b.ravel(), drawn([4], 1)[0].ravel(), drawn([4], 0, 2)[0].ravel()])
    assert len(set(everything.tolist())) == everything.size  # nothing is drawn twice
    with keyed_batch(1, 0, 0, np.arange(3)), pytest.raises(ValueError, match="4 samples"):
        uniforms(4, 1)


def test_uniforms_are_uniform_and_independent():
    with keyed_batch(0, 0, 0, np.arange(20_000)):
        u = uniforms(20_000, 4)
    assert 0 <= u.min() and u.max() < 1
    counts = np.stack([np.bincount((column * 20).astype(int), minlength=20) for column in u.T])
    assert ((counts - 1000) ** 2 / 1000).sum(1).max() < 50  # chi-squared, 19 degrees: exceeded once in 8,000
    together = np.concatenate([u, np.roll(u, 1, 0)], 1)  # columns, and neighbouring samples
    off = np.corrcoef(together, rowvar=False) - np.eye(8)
    assert np.abs(off).max() < 5 / np.sqrt(20_000)


def test_samples_of_a_batch_have_generators_of_their_own():
    with keyed_batch(5, 2, 0, np.array([8, 3])):
        with sample(1):
            inside = generator().random()
        whole = generator().random()
    with keyed(5, 2, 3, 1):
        assert generator().random() == inside
    with keyed(5, 2, 0, 1):
        assert generator().random() == whole
    with keyed(9):
        first = generator()
        with sample(0):
            assert generator() is first


# --- positions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "kind"), [(0, "thread"), (2, "thread"), (2, "process")])
def test_an_epoch_can_be_entered_anywhere(workers, kind):
    expected = bits(loader(in_memory).iterate(3))
    data = loader(in_memory, workers, kind, persistent_workers=True)
    for start in (0, 1, 4, 5):
        assert bits(data.iterate(3, start=start)) == expected[start:]
    data.close()


def test_state_is_the_batch_that_comes_next():
    data = loader(in_memory, workers=2)
    assert data.state == (0, 0)
    seen = []
    for number, batch in enumerate(data, 1):
        seen += bits([batch])
        if number == 2:
            position = data.state
            break
    assert position == (0, 2)  # two given out; more were ready
    again = loader(in_memory)
    again.set_epoch(*position)
    assert again.state == position
    assert seen + bits(again) == bits(loader(in_memory))
    assert again.state == (1, 0) and again.epoch == 1
    assert bits(again) == bits(loader(in_memory).iterate(1))
    assert again.state == (2, 0)


@pytest.mark.parametrize(("epoch", "start"), [(-1, 0), (0, -1), (0, 6)])
def test_positions_outside_are_refused(epoch, start):
    data = loader(in_memory)
    for enter in (data.iterate, data.set_epoch):
        with pytest.raises(ValueError, match=r"DataLoader: (epoch|start)=.* must be"):
            enter(epoch, start)


@pytest.mark.parametrize("bad", [{"workers": "fork"}, {"prefetch_factor": 0}, {"generator": -1}], ids=str)
def test_arguments_are_checked(bad):
    with pytest.raises(ValueError, match=f"DataLoader: {next(iter(bad))}="):
        DataLoader(Pictures(), **bad)


# --- errors -------------------------------------------------------------------------------------------------------


class Odd(Exception):
    def __init__(self, a, b):
        super().__init__("lost on the way")


class Broken(Dataset):
    """A data set that fails at sample 5 in a way of one's choice."""

    def __init__(self, how):
        self.how = how

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index == 5:
            if self.how == "file":
                raise ValueError("cannot read the image 'cat/7.jpg': truncated")
            if self.how == "odd":
                raise Odd(1, 2)
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "lambda":
                return lambda: None
        return index


@pytest.mark.parametrize(("workers", "kind"), [(0, "thread"), (1, "thread"), (1, "process")])
def test_errors_name_the_file_and_the_batch(workers, kind):
    data = DataLoader(Broken("file"), 2, num_workers=workers, workers=kind)
    seen = 0
    with pytest.raises(ValueError, match=r"cat/7\.jpg") as caught:
        for _ in data:
            seen += 1
    assert seen == 2 and "\n" not in str(caught.value)
    assert any("batch 2 of epoch 0" in note for note in caught.value.__notes__)
    assert data.state == (0, 2)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("odd", "worker process 0 failed: test_loader.Odd: lost on the way"),
        ("killed", r"worker process 0 was killed by signal 9"),
        ("lambda", "needs batches that can be pickled"),
    ],
)
def test_what_goes_wrong_in_a_process_is_said(how, message):
    with pytest.raises((RuntimeError, TypeError), match=message):
        list(DataLoader(Broken(how), 4, num_workers=1, workers="process", collate_fn=list))


def test_what_cannot_be_pickled_is_refused_at_once():
    data = DataLoader(Pictures(), num_workers=1, workers="process", batch_transform=lambda *batch: batch)
    with pytest.raises(ValueError, match=r"can be pickled.*use workers='thread'"):
        next(iter(data))


# --- processes ----------------------------------------------------------------------------------------------------


def alive(pids):
    def running(pid):
        try:
            with open(f"/proc/{pid}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    return [pid for pid in pids if running(pid)]


def test_abandoned_and_finished_loops_leave_no_process():
    pool = WorkerPool(BatchMaker(Pictures(), 0), 2)
    pids = [process.pid for process in pool.processes]
    tasks = [(0, step, np.array([step])) for step in range(9)]
    batches = pool.run(tasks, 2)
    next(batches)
    assert len(alive(pids)) == 2
    del batches, pool  # nobody calls close()
    assert not alive(pids)

    data = loader(in_memory, 1, "process", persistent_workers=True)
    for _ in data:
        break
    assert data._idle is None  # it may be in the middle of a batch: not kept
    list(data)
    (process,) = data._idle.processes
    pid = process.pid
    list(data)
    assert data._idle.processes == [process] and alive([pid])
    data.close()
    assert not alive([pid])


def test_without_shared_memory_batches_come_over_the_pipe():
    dataset, mix = in_memory()
    maker = BatchMaker(dataset, 7, None, mix)
    tasks = [(0, step, np.arange(step, step + 20)) for step in range(4)]
    pool = WorkerPool(maker, 1, shares=False)
    assert bits(pool.run(tasks, 3)) == bits(maker.make(*task) for task in tasks)
    pool.close()


def test_batches_keep_their_layout_as_bytes():
    x = np.arange(120.0).reshape(2, 3, 4, 5)
    arrays = [x, x.transpose(0, 3, 1, 2), x[:, ::2], x[::-1], np.float32(3) * np.ones(()), np.zeros((0, 3)), x.T > 7]
    for apart in (True, False):
        message, buffers = _flattened({"fields": arrays, "tensor": Tensor(x)}, apart)
        assert bool(buffers) == apart
        back = pickle.loads(message, buffers=buffers)
        for a, b in zip(arrays, back["fields"], strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype
        assert back["fields"][1].transpose(0, 2, 3, 1).flags.c_contiguous
        assert isinstance(back["tensor"], Tensor)


SCRIPT = """
import os, sys, time
from minires.data import DataLoader, Dataset

def first(samples):
    return samples[0]

class Slow(Dataset):
    def __len__(self):
        return 10_000
    def __getitem__(self, index):
        time.sleep(0.01)
        return os.getpid(), sorted(sys.modules)

if __name__ == "__main__":
    seen = set()
    for pids, modules in DataLoader(Slow(), 1, num_workers=2, workers="process", collate_fn=first):
        seen.add(pids)
        if len(seen) == 2:
            print(*seen, *modules, flush=True)
            seen = {0, 1, 2}
"""


def start(tmp_path, script):
    path = tmp_path / "script.py"
    # A shell that puts its jobs into the background lets them ignore Ctrl-C, and their children inherit that.
    path.write_text("import signal\n\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n" + script)
    command = [sys.executable, str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize("kind", ["ctrl-c", "terminated", "killed"])
def test_interrupted_and_killed_programs_leave_no_process(tmp_path, kind):
    program = start(tmp_path, SCRIPT)
    first, second, *modules = program.stdout.readline().split()
    workers = [int(first), int(second)]
    assert len(alive(workers)) == 2
    heavy = {"torch", "cupy", "matplotlib", "sklearn", "rich", "cyclopts", "minires.models", "minires.train"}
    assert "minires.data.workers" in modules and not heavy & set(modules)
    if kind == "killed":
        program.kill()
    else:  # to all of them, as a terminal or a job's end does
        os.killpg(program.pid, signal.SIGINT if kind == "ctrl-c" else signal.SIGTERM)
    _, errors = program.communicate(timeout=30)
    deadline = time.monotonic() + 10
    while alive(workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(workers)
    if kind == "ctrl-c":
        assert errors.count("Traceback") == 1 and errors.rstrip().endswith("KeyboardInterrupt")


def test_a_script_without_a_guard_is_told_so(tmp_path):
    program = start(tmp_path, SCRIPT.replace('if __name__ == "__main__":', "if True:"))
    _, errors = program.communicate(timeout=60)
    assert program.returncode == 1
    assert "must start its work under `if __name__ == '__main__':`" in errors.splitlines()[-1]


def test_samples_of_different_kinds_are_not_stacked():
    with pytest.raises(TypeError, match="cannot stack"):
        default_collate([1, None])
