"""Work in units, each a file of a folder that any number of processes share.

The files alone say what is done. A process skips the units that are there and takes free ones, each under a file lock,
which ends with the process: what a killed one was at is free again. A unit depends on nothing but its name, so two
processes that make the same one waste time and spoil nothing, and one that others seem to have forgotten is made again
rather than waited for without end.
"""

import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypedDict

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
PATIENCE = 60.0  # seconds without news of others before their units are made here
SLOWER = 3  # times the slowest unit of this process: the patience, where that is longer


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
        self._slowest = 0.0

    def __enter__(self) -> "Units":
        return self

    def __exit__(self, *_: object) -> None:
        while self._held:
            self._held.popitem()[1].release()

    def rounds(self) -> Iterator[Iterator[str]]:
        """Yield, until all units are there, those that are free now; each is taken when it is asked for.

        Raises:
            FileNotFoundError: where the folder is gone, as when another process has done all that it is for.

        Warns:
            InputWarning: where a file was damaged: it is removed, and the unit made again.
        """
        self._remove_damaged()
        known: list[str] = []
        since, told = time.monotonic(), False
        while missing := self._missing():
            now = time.monotonic()
            if missing != known:
                known, since, told = missing, now, False
            free = self._free(by_force=now - since > max(PATIENCE, SLOWER * self._slowest))
            first = next(free, None)
            if first is not None:
                yield chain([first], free)
                known = []
                continue
            if not told and now - since > SILENCE:
                told = True
                say(f"Waiting for {len(missing)} units that other processes are at, such as {missing[0]}.")
            time.sleep(POLL)

    def _missing(self) -> list[str]:
        present = {path.name for path in self.folder.iterdir()}
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
                started = time.monotonic()
                yield name
                self._slowest = max(self._slowest, time.monotonic() - started)

    def _remove_damaged(self) -> None:
        for name in self.sizes:
            try:
                self.check(self.folder / name)
            except FileNotFoundError:
                continue
            except DamagedError as error:
                warnings.warn(f"{error} It is made again.", InputWarning, stacklevel=3)
                (self.folder / name).unlink(missing_ok=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], **seconds: float) -> None:
    """Write tensors whole, with a checksum of them and of the file's name.

    Args:
        path: the file.
        tensors: by name.
        seconds: what each stage took.
    """
    told = {"seconds": seconds, "checksum": _checksum(path.name, tensors, seconds)}
    with written_whole(path) as aside:
        write_tensors(aside, tensors, {"unit": json.dumps(told)})  # in one entry: those of a header have no order


def write_tensors(path: Path, tensors: Mapping[str, Tensor], told: dict[str, str] | None = None) -> None:
    """Write a safetensors file; what the disk refuses is an OSError, as of any other file."""
    try:
        save_file(dict(tensors), path, told)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return what `save_tensors` wrote.

    Raises:
        FileNotFoundError: where there is no such file.
        DamagedError: where it holds something else.
    """
    return _load(path)[0]


def seconds_of(path: Path) -> dict[str, float]:
    """Return what `save_tensors` was told that each stage took."""
    found: dict[str, float] = _load(path)[1]
    return found


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    try:
        with safe_open(path, "pt") as file:
            told = json.loads((file.metadata() or {}).get("unit", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        whole = told["checksum"] == _checksum(path.name, tensors, told["seconds"])
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{str(path)!r} is damaged ({error}).") from error
    if not whole:
        raise DamagedError(f"{str(path)!r} is damaged (its checksum differs).")
    return tensors, told["seconds"]


def save_json(path: Path, row: dict[str, Any]) -> None:
    """Write a mapping whole, with a checksum of it and of the file's name."""
    held = {"checksum": _checksum_of_row(path.name, row), "row": row}
    with written_whole(path) as aside:
        aside.write_text(json.dumps(held, allow_nan=False), encoding="utf-8")


def load_json(path: Path, expected: Any) -> dict[str, Any]:
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
    row: dict[str, Any] = held["row"]
    if held["checksum"] != _checksum_of_row(path.name, row):
        raise DamagedError(f"{str(path)!r} is damaged (its checksum differs).")
    if fault := fault_of(row, expected, ""):
        raise DamagedError(f"{str(path)!r} is damaged or edited: {fault}.")
    return row


class _Held(TypedDict):
    checksum: str
    row: dict[str, Any]


def _checksum_of_row(name: str, row: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([name, row], sort_keys=True).encode()).hexdigest()


def _checksum(name: str, tensors: Mapping[str, Tensor], seconds: Mapping[str, float]) -> str:
    digest = hashlib.sha256(json.dumps([name, seconds]).encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
