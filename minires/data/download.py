"""Files from the network, by pooch: into a temporary file, its SHA-256 checked, then renamed; or nothing at all."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from .progress import progress

_TIMEOUT = 30  # seconds without an answer


def download(url: str, sha256: str, path: str | Path) -> Path:
    """Fetch `url` to `path`, unless a file with that SHA-256 is there already; returns the path.

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
            pooch.retrieve(url, f"sha256:{sha256}", path.name, path.parent, downloader=downloader)
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
