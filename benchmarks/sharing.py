"""How much faster are two processes than one, each on a core of its own?

    python benchmarks/sharing.py

The embedded digits pipeline; libraries are imported before the clock starts, the model is loaded after.
"""

import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

from jsonargparse import auto_cli


def work(core: int, folder: Path, ipc: int, barrier: Barrier) -> None:
    """Distil on one core, together with all that wait at the barrier."""
    os.sched_setaffinity(0, {core})
    import torch

    from d4m_plugin import Digits, Recipe, distill

    torch.set_num_threads(1)
    barrier.wait()
    distill(Digits(), Recipe(ipc=ipc), output=folder / "set", cache_dir=folder)


def seconds_of(processes: int, ipc: int) -> float:
    """Return the seconds from the start of the work to the end of the last process."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        barrier = context.Barrier(processes + 1)
        args = [(core, Path(folder), ipc, barrier) for core in range(processes)]
        started = [context.Process(target=work, args=arguments) for arguments in args]
        for process in started:
            process.start()
        barrier.wait()
        began = time.perf_counter()
        for process in started:
            process.join()
        return time.perf_counter() - began


def main(processes: int = 2, ipc: int = 50, turns: int = 5) -> None:
    """Measure one process and several, in turns.

    Args:
        processes: the several.
        ipc: images a class; 50 images are a unit.
        turns: of each.
    """
    took: dict[int, list[float]] = {1: [], processes: []}
    for _ in range(turns):
        for count, times in took.items():
            times.append(seconds_of(count, ipc))
    for count, times in took.items():
        print(f"{count} processes: {statistics.median(times):.1f} s ({min(times):.1f} to {max(times):.1f})")
    ratios = [one / several for one, several in zip(*took.values(), strict=True)]
    print(f"speed-up: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
