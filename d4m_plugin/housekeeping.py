"""`d4m cache`: what the cache holds, whether it is whole, and what can go."""

import os
import shutil
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from d4m_plugin.cache import aside_of, is_aside, resolve_cache_dir
from d4m_plugin.distilled import checksums
from d4m_plugin.errors import InputError
from d4m_plugin.record import read_record
from d4m_plugin.units import DamagedError, load_tensors

Action = Literal["list", "verify", "remove", "prune"]
DAY = 24 * 60 * 60  # seconds
PARTS = ("sets", "latents", "teachers")  # what a user would name


def cache(
    action: Action,
    names: tuple[str, ...],
    older_than: float = 7,
    cache_dir: Path | None = None,
) -> dict[str, Any]:
    """Look after the cache of distilled sets, latents of real images, and teachers.

    Args:
        action: `list` what is there; `verify` its checksums; `remove` what is named; `prune` the unfinished work that
            nobody has touched for a time.
        names: as `list` tells them; of `verify`, all by default.
        older_than: days, of `prune`.
        cache_dir: the cache; by default $D4M_CACHE, else d4m in $XDG_CACHE_HOME or ~/.cache.

    Returns:
        What to tell the user: each name, and what it is or what was done.

    Raises:
        InputError: where a name is not there, something is in use, or what was verified is damaged.
    """
    if older_than < 0:
        raise InputError(f"`older_than` is {older_than}; it must be at least 0 days.")
    root = resolve_cache_dir(cache_dir)
    there = _entries(root)
    if unknown := [name for name in names if name not in there]:
        raise InputError(f"`names` has {unknown[0]!r}, which is not in the cache {str(root)!r}; see `d4m cache list`.")
    chosen = {name: there[name] for name in names} or there
    if action == "list":
        return {name: _described(path) for name, path in chosen.items()} or {"empty": root}
    if action == "verify":
        found = {name: _damaged(path) for name, path in chosen.items()}
        damaged = {name: files for name, files in found.items() if files}
        if damaged:
            named = "; ".join(f"{name} ({', '.join(files)})" for name, files in damaged.items())
            remedy = f"d4m cache remove {' '.join(damaged)}"
            raise InputError(f"{len(damaged)} of {len(chosen)} are damaged: {named}. Remove them by `{remedy}`.")
        told = {name: "without checksums" if files is None else "whole" for name, files in found.items()}
        return told or {"empty": root}
    if action == "remove" and not names:
        raise InputError("`names` is empty; name what is to be removed, as `d4m cache list` tells it.")
    old = time.time() - older_than * DAY
    going = chosen if action == "remove" else {n: p for n, p in chosen.items() if _unfinished(p) and _touched(p) < old}
    return {name: f"removed, {_remove(name, path)}" for name, path in going.items()} or {"removed": "nothing"}


def _entries(root: Path) -> dict[str, Path]:
    """Return what is in the cache by its name: each folder or file of each part, and what killed processes left."""
    found = {path for part in PARTS for path in (root / part).glob("*")}
    # Not all of the folder, in which there may be other people's files too.
    asides = (path for part in (*PARTS, "screened") for path in (root / part).rglob(".*"))
    inside = [path.relative_to(root) for path in asides if is_aside(path)]
    left = {root / path for path in inside if not any(map(_unfinished, path.parents))}  # those go with their folder
    return {str(path.relative_to(root)): path for path in sorted(found | left) if path.suffix != ".lock"}


def _unfinished(path: Path) -> bool:
    return path.suffix == ".partial" or is_aside(path)


def _stats(path: Path) -> list[os.stat_result]:
    """Return what the system knows of a path and of all in it, but for what another process takes away meanwhile."""
    stats = []
    for each in (path, *path.rglob("*")):
        with suppress(FileNotFoundError):
            stats.append(each.stat())
    return stats


def _size(path: Path) -> str:
    return f"{sum(each.st_size for each in _stats(path) if stat.S_ISREG(each.st_mode)) / 1e6:,.1f} MB"


def _touched(path: Path) -> float:
    return max((each.st_mtime for each in _stats(path)), default=0.0)


def _described(path: Path) -> str:
    days = (time.time() - _touched(path)) / DAY
    told = [_size(path), f"{days:.0f} days old"]
    if path.suffix == ".partial":
        units = {kind: len(list(path.glob(f"*/{kind}-*.safetensors"))) for kind in ("class", "block")}
        return ", ".join([*told, f"unfinished: {units['class']} classes and {units['block']} blocks of images done"])
    if _unfinished(path):
        return ", ".join([*told, "left by a process that was killed"])
    for record in path.glob("*/d4m.json"):
        try:
            metadata = read_record(record.parent)
        except InputError:
            told.append("damaged")
            continue
        recipe = metadata["recipe"]
        options = (f"{name} {recipe[name]}" for name in ("ipc", "strength", "guidance_scale", "seed"))
        told += [f"finished: {metadata['source']['name']} by {recipe['diffusion']}", *options]
    return ", ".join(told)


def _damaged(path: Path) -> list[str] | None:
    """Return which files are not what was written; None where nothing has a checksum."""
    if path.suffix == ".partial" or path.parent.name == "latents":
        units = path.glob("*/*.safetensors" if path.suffix == ".partial" else "*.safetensors")
        return [file.name for file in units if not _is_whole(file)]
    records = list(path.glob("*/d4m.json"))
    return [name for record in records for name in _damaged_of_set(record)] if records else None


def _is_whole(unit: Path) -> bool:
    try:
        load_tensors(unit)
    except DamagedError:
        return False
    except FileNotFoundError:  # another process has it now
        return True
    return True


def _damaged_of_set(record: Path) -> list[str]:
    try:
        known = read_record(record.parent)["checksums"]
    except InputError:
        return [record.name]
    found = checksums(record.parent)
    return [name for name, checksum in known.items() if found.get(name) != checksum]


def _remove(name: str, path: Path) -> str:
    """Remove a file or folder, of which no other process holds a unit, and return its size."""
    size = _size(path)
    for lock in path.rglob("*.lock"):
        try:
            with FileLock(lock, blocking=False):
                pass
        except Timeout as error:
            raise InputError(f"{name!r} is in use by another process; stop it first.") from error
    if path.is_dir():
        going = aside_of(path)
        path.replace(going)  # all at once, so that nobody reads half of it
        shutil.rmtree(going)
    else:
        path.unlink()
    return size
