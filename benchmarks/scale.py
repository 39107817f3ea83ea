"""How do time and memory grow with classes, images, IPC and processes, and what would ImageNet take?

    python benchmarks/scale.py growth --picture docs/results/growth.png
    python benchmarks/scale.py cost --encoded_a_second 360 --synthesised_a_second 2.5 --gpus 8

Each point of `growth` is a folder of tiny files made for it and distilled by the embedded digits pipeline in processes
of their own, each on a core of its own. `cost` is arithmetic on rates that were measured elsewhere.
"""

import json
import multiprocessing
import os
import tempfile
import threading
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import auto_cli

MIB = 2**10  # kibibytes, the unit of /proc
LATENT = 4 * 64 * 64 * 2  # bytes of a prototype at 512 pixels; kept latents of real images take twice as many


class Size(NamedTuple):
    """What is distilled, and by how many processes."""

    classes: int = 10
    images: int = 100  # of a class
    ipc: int = 2
    processes: int = 1


GROWTH = {  # each from the same base
    "classes": [Size(classes=number) for number in (10, 100, 1000)],
    "images": [Size(images=number) for number in (100, 1000, 10_000)],
    "ipc": [Size(ipc=number) for number in (2, 10, 50)],
    "processes": [Size(ipc=50, processes=number) for number in (1, 2)],
}
COUNTED = {"classes": "classes", "images": "real images a class", "ipc": "images a class", "processes": "processes"}
REAL = {"ImageNet-1K": (1000, 1_281_167), "ImageNet-21K": (21_841, 14_197_122)}  # classes and images


def make_folder(root: Path, size: Size) -> None:
    """Write images of 8x8 pixels into class folders, each class of its own grey."""
    import io

    from PIL import Image

    for label in range(size.classes):
        folder = root / f"class {label:04}"
        folder.mkdir(parents=True)
        for number in range(size.images):
            content = io.BytesIO()
            Image.new("L", (8, 8), (label + 40 * number) % 256).save(content, "PNG")
            (folder / f"{number}.png").write_bytes(content.getvalue())


def memory() -> float:
    """Return the MiB that this process holds and cannot drop: not those of files that are mapped into it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / MIB


def work(
    core: int, folder: Path, size: Size, barrier: Barrier, rows: "multiprocessing.Queue[dict[str, float]]"
) -> None:
    """Distil on one core, together with all that wait at the barrier; put seconds, and what memory grew by."""
    os.sched_setaffinity(0, {core})
    import torch

    from d4m_plugin import ImageFolder, LatentDiffusion, Recipe, distill

    torch.set_num_threads(1)
    LatentDiffusion("digits")  # libraries and weights count before, not as growth
    before, done = memory(), threading.Event()
    peak = before

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, memory())

    watching = threading.Thread(target=watch)
    barrier.wait()
    watching.start()
    started = time.perf_counter()
    source = ImageFolder(folder / "photos", image_size=32)
    _ = source.fingerprint
    indexed = time.perf_counter() - started
    recipe = Recipe(ipc=size.ipc, diffusion="digits", num_inference_steps=10)
    dataset = distill(source, recipe, output=folder / "set", cache_dir=folder)
    total = time.perf_counter() - started
    done.set()
    watching.join()
    stages = json.loads((dataset.folder / "d4m.json").read_text())["seconds"]
    rows.put({"total": total, "index": indexed, **stages, "before MiB": before, "peak MiB": peak})


def measure(size: Size) -> dict[str, float]:
    """Return the seconds of all and of each stage, and the MiB before and at the peak of the largest process."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder) / "photos", size)
        barrier, rows = context.Barrier(size.processes), context.Queue()
        args = [(core, Path(folder), size, barrier, rows) for core in range(size.processes)]
        started = [context.Process(target=work, args=arguments) for arguments in args]
        for process in started:
            process.start()
        found = [rows.get() for _ in started]
        for process in started:
            process.join()
    return {name: round(max(row[name] for row in found), 2) for name in found[0]}


def growth(rows: Path = Path("growth.jsonl"), picture: Path | None = None) -> None:
    """Measure each point that is not in `rows` yet, print all, and draw.

    Args:
        rows: a file with a row for each point.
        picture: time and memory against what grows.
    """
    rows.touch()
    known = {Size(**row["size"]): row for row in map(json.loads, rows.read_text().splitlines())}
    for size in dict.fromkeys(size for sizes in GROWTH.values() for size in sizes):
        if size not in known:
            known[size] = {"size": size._asdict(), **measure(size)}
            with rows.open("a") as file:
                print(json.dumps(known[size]), file=file)
        print(json.dumps(known[size]), flush=True)
    if picture is not None:
        draw(known, picture)


def draw(known: dict[Size, dict[str, Any]], picture: Path) -> None:
    """Draw time, with a dashed line of what is proportional, and memory."""
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    from d4m_plugin.evaluation.figures import OTHERS, OURS, new_figure

    figure = new_figure(12, 5)
    axes = figure.subplots(2, len(GROWTH), sharey="row")
    for (name, sizes), (times, memories) in zip(GROWTH.items(), axes.T, strict=True):
        places = [getattr(size, name) for size in sizes]
        seconds = [known[size]["total"] for size in sizes]
        power = -1 if name == "processes" else 1
        straight = [seconds[-1] * (place / places[-1]) ** power for place in places]
        times.plot(places, straight, "--", color="grey", label="proportional")
        times.plot(places, seconds, "o-", color=OURS, label="measured")
        times.set(xscale="log", yscale="log")
        memories.plot(places, [known[size]["peak MiB"] for size in sizes], "o-", color=OTHERS, label="at its peak")
        memories.plot(places, [known[size]["before MiB"] for size in sizes], ":", color="grey", label="before")
        memories.set(xscale="log", ylim=(0, None), xlabel=COUNTED[name])
        for axis in (times, memories):
            axis.xaxis.set_major_locator(FixedLocator(places))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_formatter(ScalarFormatter())
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("memory of a process, MiB")
    for axis in axes[:, 0]:
        axis.legend()
    figure.savefig(picture, dpi=100)


def cost(
    encoded_a_second: float,
    synthesised_a_second: float,
    clustered_seconds: float = 1.0,
    bytes_an_image: int = 400_000,
    gpus: int = 8,
) -> None:
    """Print what distilling ImageNet takes.

    Args:
        encoded_a_second: real images, on one GPU.
        synthesised_a_second: images, on one GPU.
        clustered_seconds: of a class, by a process for each GPU, while the next class is encoded.
        bytes_an_image: of a distilled PNG.
        gpus: that share the work.
    """
    print("| | images a class | encoding, h | synthesis, h | GPU hours | set, GB | prototypes, GB | kept latents, GB |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (classes, images) in REAL.items():
        for ipc in (10, 50):
            encoding = max(images / encoded_a_second, classes * clustered_seconds) / 3600
            synthesis = classes * ipc / synthesised_a_second / 3600
            stored = [classes * ipc * bytes_an_image, classes * ipc * LATENT, images * 2 * LATENT]
            hours = f"{encoding / gpus:.1f} | {synthesis / gpus:.1f} | {encoding + synthesis:.1f}"
            print(f"| {name} | {ipc} | {hours} | {' | '.join(f'{each / 1e9:.1f}' for each in stored)} |")


if __name__ == "__main__":
    auto_cli([growth, cost], as_positional=False)
