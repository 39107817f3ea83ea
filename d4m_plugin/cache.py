"""Where finished and unfinished work is kept."""

import errno
import hashlib
import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from d4m_plugin.errors import InputError

REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}
REFUSALS |= {errno.ENOLCK, errno.EOPNOTSUPP}  # of file systems that know no locks


def refusal_of(error: BaseException) -> str | None:
    """Return what to tell of a disk that is full, or a file that may not be used; None of any other error."""
    if not isinstance(error, OSError) or error.errno not in REFUSALS:
        return None
    what = "the disk" if error.filename is None else repr(str(error.filename))
    return f"{what} could not be used ({error.strerror}); what is done is kept: mend that and start again."


def resolve_cache_dir(cache_dir: str | Path | None = None) -> Path:
    """Return the cache folder: the one given, else $D4M_CACHE, else $XDG_CACHE_HOME/d4m, else ~/.cache/d4m.

    Raises:
        InputError: where it cannot be made or written.
    """
    default = f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/d4m"
    folder = Path(cache_dir or os.environ.get("D4M_CACHE") or default)
    try:
        folder = folder.expanduser().resolve()
    except RuntimeError as error:  # without a home
        raise InputError(f"`cache_dir` is {str(folder)!r}: {error} Name another folder, as $D4M_CACHE too.") from error
    make_writable(folder, "cache_dir")
    return folder


def make_writable(folder: Path, option: str) -> None:
    """Make a folder where it is not there, and try to write in it.

    Raises:
        InputError: where that fails; it names the option that the folder comes from.
    """
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # a process of this number on another machine may have been here
    except OSError as error:
        raise InputError(
            f"`{option}` is {str(folder)!r}, which cannot be written ({error.strerror}); name another folder."
        ) from error


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; flush and rename it at the end, so that readers see all or nothing."""
    aside = aside_of(path)
    try:
        yield aside
        flush(aside)
        aside.replace(path)
        with suppress(OSError):  # not every file system can
            flush(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def aside_of(path: Path) -> Path:
    """Return where this process writes what will be at `path`, or puts what was: .NAME.HOST.PROCESS beside it."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")  # two machines may share a folder


def is_aside(path: Path) -> bool:
    """Whether a path is one that `aside_of` gave, to this process or another."""
    return re.fullmatch(r"\..+\.[^.]+\.\d+", path.name) is not None


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(content: Any) -> str:
    """Return the SHA-256 of what JSON can hold, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def flush(path: Path) -> None:
    """Have a file, or a folder's list of files, outlast a power cut."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
