"""Files from the network, by pooch: into a temporary file, its SHA-256 checked, then renamed; or nothing at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from .progress import progress

_TIMEOUT = 30  # seconds without an answer


def download(url: str, sha256: str, path: str | Path) -> Path:
    """Fetch `url` to `path`, unless a file with that SHA-256 is there already; returns the path.

    sha256: its 64 digits, or only the first ones, where no more are known: at least 8.
    Raises RuntimeError where pooch is missing; OSError where the network, the server or the disk fails; and ValueError
    where the content has another hash. Then no file is left.
    """
    try:
        import pooch
    except ImportError:
        raise RuntimeError("downloading needs pooch: pip install 'minires[data]'") from None
    path = Path(path)
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel("WARNING")  # the bar says what happens
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with progress(f"downloading {path.name}", None, size=True) as advance:
            downloader: Any = pooch.HTTPDownloader(progressbar=_Bar(advance), timeout=_TIMEOUT)  # type: ignore[arg-type]
            if len(sha256) == 64:
                pooch.retrieve(url, f"sha256:{sha256}", path.name, path.parent, downloader=downloader)
            else:
                _retrieve(url, sha256, path, downloader)
    except ValueError as error:
        if "hash" not in str(error):
            raise
        raise ValueError(
            f"what came from {url} is not the expected file (its SHA-256 differs), and was removed; try again, or put "
            f"the file at {str(path)!r} yourself"
        ) from error
    except OSError as error:  # requests' errors are OSErrors too
        raise OSError(
            f"cannot download {url}: {_short(error)}; check the network, or put the file at {str(path)!r} yourself"
        ) from error
    finally:
        logger.setLevel(level)
    with contextlib.suppress(OSError):
        path.chmod(0o644)  # temporary files are their owner's alone
    return path


def _retrieve(url: str, digits: str, path: Path, downloader: Any) -> None:
    """`pooch.retrieve` for a hash of which only the first digits are known."""
    import pooch

    if len(digits) < 8:
        raise RuntimeError(f"{digits!r} is too little of a SHA-256: 8 digits are the least")
    if path.exists() and pooch.file_hash(str(path)).startswith(digits):
        return
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        pooch.retrieve(url, None, beside.name, path.parent, downloader=downloader)
        if not pooch.file_hash(str(beside)).startswith(digits):
            raise ValueError("another hash")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


class _Bar:
    """What pooch asks of a progress bar."""

    def __init__(self, advance: Any):
        self.advance, self.total = advance, 0

    def update(self, amount: int) -> None:
        self.advance(amount)

    def reset(self) -> None:
        pass

    def close(self) -> None:
        pass


def _short(error: OSError) -> str:
    """The innermost reason: requests wraps errors several layers deep."""
    cause: BaseException = error
    while isinstance(inner := (cause.__cause__ or cause.__context__ or getattr(cause, "reason", None)), BaseException):
        cause = inner
    return (str(cause) or type(cause).__name__).splitlines()[0]
