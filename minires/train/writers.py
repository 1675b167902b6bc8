"""The records of a run: metrics.jsonl, the same rows in metrics.csv, and TensorBoard's files if asked.

A row is a dict with the key "step"; rows come in ascending steps. A line of JSON each, written and flushed at once. The
table's columns are those of the first row; a key that comes later gets a new column at the end. Numbers that are not
finite are null in JSON and empty in the table.

When a run is resumed, `truncate_to(step)` drops the rows after that step, also a last one that was half written when
the run was killed, so that the resumed run's rows follow without a gap or a repetition. The lines of JSON are what the
other files are made from then.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..serialization import write_atomically

Row = dict[str, Any]


def open_writers(folder: str | Path, tensorboard: bool = False) -> Writers:
    """Open the records in `folder`, which exists; rows that are there stay.

    Raises RuntimeError saying what to install where `tensorboard` is asked for and tensorboardX is missing, before
    any file is made; OSError where a file cannot be written.
    """
    if tensorboard:
        tensorboard_writer()
    return Writers(Path(folder), tensorboard)


class Writers:
    """What `open_writers` returns; also a context manager that closes itself."""

    def __init__(self, folder: Path, tensorboard: bool):
        self._json, self._csv, self._events = folder / "metrics.jsonl", folder / "metrics.csv", folder / "tensorboard"
        self._tensorboard = tensorboard
        self._board: Any = None
        self._columns: list[str] = []
        self._rewrite(self.rows())

    def rows(self) -> list[Row]:
        """The rows that the file holds."""
        return read_rows(self._json)

    def add(self, row: Mapping[str, Any]) -> None:
        """Write a row. ValueError where it has no step, or one before the last row's."""
        row = {key: _plain(value) for key, value in row.items()}
        step = row.get("step")
        if not isinstance(step, int) or step < self._last:
            raise ValueError(f"a row's step must be a whole number from {self._last}, not {step!r}")
        text = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        _append(self._json, text)
        if row.keys() <= set(self._columns):
            _append(self._csv, self._line(row))
        else:
            self._write_table(self.rows())
        self._last = step
        self._show(row)

    def truncate_to(self, step: int) -> None:
        """Drop the rows of later steps."""
        self._rewrite([row for row in self.rows() if row["step"] <= step])

    def close(self) -> None:
        """Nothing more will come."""
        if self._board is not None:
            self._board.close()
            self._board = None

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _rewrite(self, rows: list[Row]) -> None:
        """Make all files from these rows; what does not change is not touched."""
        self._last = rows[-1]["step"] if rows else 0
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if self._json.exists() and self._json.read_bytes() != text.encode():
            write_atomically(self._json, lambda beside: beside.write_bytes(text.encode()))
        self._write_table(rows)
        self.close()
        if self._tensorboard:  # its files can only grow: they are written anew
            shutil.rmtree(self._events, ignore_errors=True)
            self._board = tensorboard_writer()(str(self._events))
            for row in rows:
                self._show(row)

    def _write_table(self, rows: list[Row]) -> None:
        self._columns = list(dict.fromkeys(key for row in rows for key in row))
        text = "".join(map(self._line, [dict(zip(self._columns, self._columns, strict=True)), *rows])) if rows else ""
        if text if not self._csv.exists() else self._csv.read_bytes() != text.encode():
            write_atomically(self._csv, lambda beside: beside.write_bytes(text.encode()))

    def _line(self, row: Row) -> str:
        line = io.StringIO()
        csv.DictWriter(line, self._columns, lineterminator="\n").writerow(row)
        return line.getvalue()

    def _show(self, row: Row) -> None:
        if self._board is not None:
            for key, value in row.items():
                if isinstance(value, (int, float)) and key != "step":
                    self._board.add_scalar(key, value, row["step"])
            self._board.flush()


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl, [] where there is none. A last line that is cut off is left out; ValueError names
    any other line that is no row."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")  # whole ones end in \n: the last of these is empty, or cut off
    rows = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            if not isinstance(row["step"], int):
                raise ValueError("its step is no whole number")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a row of metrics ({error}); remove the line") from error
        rows.append(row)
    return rows


def _append(path: Path, text: str) -> None:
    """Write at the end of a file; where the disk is full, nothing of it stays."""
    with open(path, "ab", buffering=0) as file:
        end, data = file.tell(), text.encode()
        try:
            if (written := file.write(data)) != len(data):
                raise OSError(errno.ENOSPC, f"only {written} of {len(data)} bytes fitted", str(path))
            os.fsync(file.fileno())  # a checkpoint that counts on the row comes next
        except OSError:
            file.truncate(end)
            raise


def _plain(value: Any) -> Any:
    """As JSON holds it: Python's numbers, None for what is not finite."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def tensorboard_writer() -> Any:
    """The class that writes TensorBoard's files. RuntimeError saying what to install where it is missing."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise RuntimeError("tensorboard needs tensorboardX: pip install 'minires[tensorboard]'") from None
    return SummaryWriter
