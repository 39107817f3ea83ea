"""Do indexing and clustering keep memory flat when the folder grows?

    python benchmarks/scale.py

Each size is a process of its own, over a folder of tiny files made for it, through the embedded digits pipeline.
"""

import json
import multiprocessing
import tempfile
import threading
import time
from pathlib import Path

from jsonargparse import auto_cli

MIB = 2**10  # kibibytes, the unit of /proc


def make_folder(root: Path, classes: int, files: int) -> None:
    """Write `files` images of 8x8 pixels into `classes` class folders, each class of its own grey."""
    import io

    from PIL import Image

    for label in range(classes):
        folder = root / f"class {label:04}"
        folder.mkdir(parents=True)
        for number in range(files // classes):
            content = io.BytesIO()
            Image.new("L", (8, 8), (label + 40 * number) % 256).save(content, "PNG")
            (folder / f"{number}.png").write_bytes(content.getvalue())


def memory() -> float:
    """Return the MiB that this process holds and cannot drop: not those of files that are mapped into it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / MIB


def measure(root: Path, num_workers: int, rows: "multiprocessing.Queue[dict[str, float]]") -> None:
    """Put the seconds of each stage, and what memory grew by at its peak."""
    from d4m_plugin import ImageFolder, LatentDiffusion, Recipe, distill
    from d4m_plugin.progress import Progress

    LatentDiffusion("digits")  # libraries and weights count before, not as growth
    before, peaks, done = memory(), dict[str, float](), threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            for bar in list(Progress._instances):
                peaks[bar.desc] = max(peaks.get(bar.desc, 0), memory() - before)

    watching = threading.Thread(target=watch)
    watching.start()
    started = time.perf_counter()
    source = ImageFolder(root, image_size=32)
    _ = source.fingerprint
    row = {"index": time.perf_counter() - started}
    peaks["Index"] = memory() - before
    recipe = Recipe(ipc=2, diffusion="digits", num_inference_steps=2)
    dataset = distill(source, recipe, output=root.parent / "set", cache_dir=root.parent, num_workers=num_workers)
    done.set()
    watching.join()
    row |= json.loads((dataset.folder / "d4m.json").read_text())["seconds"]
    rows.put(row | {f"{stage} MiB": peak for stage, peak in peaks.items()})


def main(
    sizes: tuple[tuple[int, int], ...] = ((10, 10_000), (100, 10_000), (1000, 10_000), (1000, 200_000)),
    num_workers: int = 2,
) -> None:
    """Measure each size.

    Args:
        sizes: classes and files of each folder.
        num_workers: processes that read images.
    """
    context = multiprocessing.get_context("spawn")
    for classes, files in sizes:
        with tempfile.TemporaryDirectory() as folder:
            make_folder(Path(folder) / "photos", classes, files)
            rows = context.Queue()
            child = context.Process(target=measure, args=(Path(folder) / "photos", num_workers, rows))
            child.start()
            row = rows.get()
            child.join()
        print(json.dumps({"classes": classes, "files": files} | {name: round(v, 1) for name, v in row.items()}))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
