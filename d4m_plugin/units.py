"""Work in units, each a file of a folder that any number of processes share.

The files alone say what is done. A process skips the units that are there and takes free ones, each under a file lock,
which ends with the process: what a killed one was at is free again. A process touches the locks that it holds from time
to time. A unit depends on nothing but its name, so two processes that make the same one waste time and spoil nothing:
what a process holds that has not been heard of, such as a machine that the network lost, is made again.
"""

import hashlib
import json
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from d4m_plugin.cache import written_whole
from d4m_plugin.checking import fault_of, read_json
from d4m_plugin.errors import InputError, InputWarning
from d4m_plugin.progress import Progress, say

POLL = 0.2  # seconds between looks at what others have done
SILENCE = 5.0  # seconds of waiting before it is said
BEAT = 10.0  # seconds between two signs of life
PATIENCE = 60.0  # seconds without one before the units of others are made here

T = TypeVar("T")


class DamagedError(InputError):
    """A unit's file does not hold what was written."""


class Units:
    """The units of one stage; as a context, those that are taken are free again at its end.

    Args:
        folder: where their files lie.
        sizes: the name of each file, and how much of the progress it stands for.
        check: reads a file; raises DamagedError.
        progress: shows what is done by all processes.
    """

    def __init__(
        self, folder: Path, sizes: Mapping[str, int], check: Callable[[Path], object], progress: Progress
    ) -> None:
        self.folder, self.sizes, self.check, self.progress = folder, sizes, check, progress
        self._held: dict[str, FileLock] = {}
        self._ended = threading.Event()

    def __enter__(self) -> "Units":
        threading.Thread(target=self._live, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        while self._held:
            self._held.popitem()[1].release()

    def _live(self) -> None:
        while not self._ended.wait(BEAT):
            for lock in list(self._held.values()):
                with suppress(OSError):  # the folder may be gone
                    os.utime(lock.lock_file)

    def rounds(self) -> Iterator[Iterator[str]]:
        """Yield, until all units are there, those that are free now; each is taken when it is asked for.

        Raises:
            FileNotFoundError: where the folder is gone, as when another process has done all that it is for.

        Warns:
            InputWarning: where a file was damaged: it is removed, and the unit made again.
        """
        self._remove_damaged()
        news: object = None  # of other processes
        started = heard = time.monotonic()
        told = False
        while missing := self._missing():
            now = time.monotonic()
            if (latest := [(name, self._touched(name)) for name in missing]) != news:
                news, heard = latest, now
            free = self._free(by_force=now - heard > PATIENCE)
            first = next(free, None)
            if first is not None:
                yield chain([first], free)
                started, told = time.monotonic(), False
                continue
            if not told and now - started > SILENCE:
                told = True
                say(f"Waiting for {len(missing)} units that other processes are at, such as {missing[0]}.")
            time.sleep(POLL)

    def _touched(self, name: str) -> float:
        """Return when the process that holds a unit last gave a sign of life, by its own machine's clock."""
        try:
            return (self.folder / f"{name}.lock").stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _missing(self) -> list[str]:
        present = set(os.listdir(self.folder))
        for name in self._held.keys() & present:
            self._held.pop(name).release()
        missing = [name for name in self.sizes if name not in present]
        done = sum(size for name, size in self.sizes.items() if name in present)
        self.progress.reach(done, f"{len(self.sizes) - len(missing)}/{len(self.sizes)} units")
        return missing

    def _free(self, by_force: bool) -> Iterator[str]:
        for name in self._missing():
            lock = FileLock(self.folder / f"{name}.lock")
            try:
                lock.acquire(blocking=False)
                self._held[name] = lock
            except Timeout:
                if not by_force:
                    continue
            if name in self._missing():  # and not made since
                yield name

    def _remove_damaged(self) -> None:
        for name in self.sizes:
            try:
                self.check(self.folder / name)
            except FileNotFoundError:
                continue
            except DamagedError as error:
                warnings.warn(f"{error} It is made again.", InputWarning, stacklevel=3)
                (self.folder / name).unlink(missing_ok=True)


@contextmanager
def in_turn(file: Path, what: str) -> Iterator[None]:
    """Run the body in one process at a time; the others wait, and say so.

    Args:
        file: what is made; its lock lies beside it.
        what: what to say that another process is doing, such as "checks the images".
    """
    lock = FileLock(f"{file}.lock")
    try:
        lock.acquire(timeout=SILENCE)
    except Timeout:
        say(f"Waiting for another process, which {what}.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], **seconds: float) -> None:
    """Write tensors whole, with a checksum of them and of the file's name.

    Args:
        path: the file.
        tensors: by name.
        seconds: what each stage took.
    """
    told = {"seconds": seconds, "checksum": checksum_of(tensors, path.name, seconds)}
    with written_whole(path) as aside:
        write_tensors(aside, tensors, {"unit": json.dumps(told)})  # in one entry: those of a header have no order


def write_tensors(path: Path, tensors: Mapping[str, Tensor], told: dict[str, str] | None = None) -> None:
    """Write a safetensors file; what the disk refuses is an OSError, as of any other file."""
    try:
        path.touch()
        mode = path.stat().st_mode  # of any file made here; safetensors makes its own for their owner alone
        save_file(dict(tensors), path, told)
        path.chmod(mode)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def open_tensors(path: Path) -> safe_open:
    """Open a safetensors file, which safetensors calls one that is not there where it may not be read.

    Raises:
        OSError: where it is not there, or may not be read.
        SafetensorError: where it is no safetensors file.
    """
    path.open("rb").close()
    return safe_open(path, "pt")


def seconds_of(path: Path) -> dict[str, float]:
    """Return what `save_tensors` was told that each stage took, of a file that `load_tensors` found whole."""
    with safe_open(path, "pt") as file:
        seconds: dict[str, float] = json.loads(file.metadata()["unit"])["seconds"]
    return seconds


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return what `save_tensors` wrote.

    Raises:
        FileNotFoundError: where there is no such file.
        DamagedError: where it holds something else.
    """
    try:
        with open_tensors(path) as file:
            told = json.loads((file.metadata() or {}).get("unit", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        whole = told["checksum"] == checksum_of(tensors, path.name, told["seconds"])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{str(path)!r} is damaged ({error}).") from error
    if not whole:
        raise DamagedError(f"{str(path)!r} is damaged (its checksum differs).")
    return tensors


def save_json(path: Path, row: Mapping[str, Any]) -> None:
    """Write a mapping whole, with a checksum of it and of the file's name."""
    held = {"checksum": _checksum_of_row(path.name, row), "row": row}
    with written_whole(path) as aside:
        aside.write_text(json.dumps(held, indent=1, allow_nan=False), encoding="utf-8")


def load_json(path: Path, expected: type[T]) -> T:
    """Return what `save_json` wrote.

    Args:
        path: the file.
        expected: what the mapping must be, as for `fault_of`.

    Raises:
        FileNotFoundError: where there is no such file.
        DamagedError: where it holds something else.
    """
    try:
        held = read_json(path.read_bytes(), _Held, repr(str(path)))
    except InputError as error:
        raise DamagedError(str(error)) from error
    row: T = held["row"]
    if held["checksum"] != _checksum_of_row(path.name, row):
        raise DamagedError(f"{str(path)!r} is damaged (its checksum differs).")
    if fault := fault_of(row, expected, ""):
        raise DamagedError(f"{str(path)!r} is damaged or edited: {fault}.")
    return row


class _Held(TypedDict):
    checksum: str
    row: dict[str, Any]


def _checksum_of_row(name: str, row: Any) -> str:
    return hashlib.sha256(json.dumps([name, row], sort_keys=True).encode()).hexdigest()


def checksum_of(tensors: Mapping[str, Tensor], *others: Any) -> str:
    """Return the SHA-256 of tensors by their names, and of what else JSON can hold."""
    digest = hashlib.sha256(json.dumps(others).encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
