"""Is a distilled set better than as many random real images, trained on in the same way?

    python benchmarks/accuracy.py --output benchmarks/digits.jsonl
    python benchmarks/accuracy.py --source CIFAR10 --source.root data --output benchmarks/cifar10.jsonl \
        --labels '[soft, hard]' --epochs 500
    python benchmarks/accuracy.py --arms '[distilled]' --ipc '[10]' --changes '{"matching": {"mixing": "mixup"}}'

The runs of a row of the table differ in the images alone. A seed decides the drawn or distilled images, the student's
initial weights and the batches. The last step counts.
"""

import json
import logging
import math
import statistics
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from jsonargparse import auto_cli

from d4m_plugin import D4MDataModule, Digits, ImageClassifier, LatentDiffusion, Source, TeacherMatching
from d4m_plugin.devices import trainer_precision
from d4m_plugin.evaluation.arms import chosen_by
from d4m_plugin.evaluation.sets import Squares
from d4m_plugin.lightning_cli import DEFAULT_STEPS
from d4m_plugin.sources import LabelledImages
from d4m_plugin.sources.images import squares_of
from d4m_plugin.teachers import load_teacher

Arm = Literal["distilled", "random", "confident", "round trip", "real"]
Labels = Literal["soft", "hard"]
Changes = dict[Literal["data", "model", "matching"], dict[str, Any]]
BATCH = 100  # images, as in the paper's supplement


def through_the_vae(images: LabelledImages, model: LatentDiffusion) -> Squares:
    """Return images as the diffusion model's VAE gives them back: what its reconstruction alone costs."""
    batches = squares_of(images, model.resolution).split(BATCH)
    return Squares(torch.cat([model.decode(model.encode(batch)) for batch in batches]), images.targets)


def surest(source: Source, ipc: int, teacher: str) -> Squares:
    """Return the real images of each class that the teacher is surest of."""
    to_squares = partial(squares_of, size=source.image_size)
    classes = len(source.classes)
    network = load_teacher(teacher, source).eval()
    chosen = chosen_by(network, source.train(), [ipc] * classes, to_squares, "confident")
    return Squares(chosen, [label for label in range(classes) for _ in range(ipc)])


def accuracy(
    source: Source,
    arm: Arm,
    labels: Labels,
    ipc: int,
    seed: int,
    steps: int,
    teacher: str,
    recipe: dict[str, Any],
    changes: Changes,
) -> float:
    """Return the accuracy of one run on the real test images."""
    L.seed_everything(seed, verbose=False)
    drawn = "random" if arm == "round trip" or arm == "confident" else arm
    options = {"batch_size": BATCH} | (recipe if arm == "distilled" else {}) | changes.get("data", {})
    data = D4MDataModule(source, train_on=drawn, ipc=ipc or 1, seed=seed, **options)
    if arm == "round trip":
        model = LatentDiffusion(recipe.get("diffusion", source.diffusion))
        data.training_set = through_the_vae(data.training_set, model)
    if arm == "confident":
        data.training_set = surest(source, ipc, teacher)
    student = ImageClassifier(data.num_classes, data.image_size, compile=True, **changes.get("model", {}))
    matching: dict[str, Any] = {"compile_teacher": True} | changes.get("matching", {})
    trainer = L.Trainer(
        max_steps=steps,
        precision=trainer_precision(),
        callbacks=[TeacherMatching(teacher if labels == "soft" else None, **matching)],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(student, datamodule=data)
    return float(trainer.test(student, datamodule=data, verbose=False)[0]["test_accuracy"])


def main(
    source: Source | None = None,
    output: Path = Path("accuracy.jsonl"),
    arms: tuple[Arm, ...] = ("distilled", "random", "real"),
    labels: tuple[Labels, ...] = ("soft",),
    ipc: tuple[int, ...] = (1, 10),
    seeds: int = 3,
    epochs: int | None = None,
    teacher: str = "auto",
    recipe: dict[str, Any] | None = None,
    changes: Changes | None = None,
) -> None:
    """Run what is missing, then print the table.

    Args:
        source: the real images; scikit-learn's digits by default.
        output: a row a run; runs that are there are not made again.
        arms: what is trained on.
        labels: the teacher's (soft) or the images' own (hard).
        ipc: images per class.
        seeds: runs a cell.
        epochs: passes over the set, as in the paper; by default 500 steps.
        teacher: as TeacherMatching takes it.
        recipe: options of the Recipe for the distilled arm.
        changes: other options of the data module, the student and TeacherMatching than the defaults.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    source, recipe, changes = source or Digits(), recipe or {}, changes or {}
    batch = changes.get("data", {}).get("batch_size", BATCH)
    rows = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    done = {key_of(row): row["accuracy"] for row in rows}
    cells: list[tuple[Labels, int, Arm]]
    cells = [(kind, images, arm) for kind in labels for images in ipc for arm in arms if arm != "real"]
    cells += [(kind, 0, "real") for kind in labels if "real" in arms]  # in as many steps as the largest set
    for seed in range(seeds):
        for kind, images, arm in cells:
            size = (images or max(ipc)) * len(source.classes)
            steps = epochs * math.ceil(size / batch) if epochs else DEFAULT_STEPS
            asked = teacher if kind == "soft" or arm == "confident" else None
            row: dict[str, Any] = {"source": source.name, "teacher": asked}
            row |= {"arm": arm, "labels": kind, "ipc": images, "seed": seed, "steps": steps}
            row |= {"recipe": recipe if arm == "distilled" else {}, "changes": changes}
            if key_of(row) in done:
                continue
            started = time.perf_counter()
            row["accuracy"] = round(accuracy(source, arm, kind, images, seed, steps, teacher, recipe, changes), 4)
            row["seconds"] = round(time.perf_counter() - started, 1)
            done[key_of(row)] = row["accuracy"]
            rows.append(row)
            with output.open("a") as file:
                file.write(f"{json.dumps(row)}\n")
            print(row, flush=True)
    print_table(rows)


def key_of(row: dict[str, Any]) -> str:
    """Return what a run is known by."""
    decides = {name: value for name, value in row.items() if name not in ("accuracy", "seconds")}
    return json.dumps(decides, sort_keys=True)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print mean and standard deviation over the seeds, %."""
    cells: dict[tuple[str, int, int, str], list[float]] = {}
    for row in rows:
        arm = " ".join(str(part) for part in (row["arm"], row["recipe"], row["changes"]) if part)
        kind = f"{row['labels']} {row['teacher'] or ''}"
        cells.setdefault((kind, row["ipc"], row["steps"], arm), []).append(100 * row["accuracy"])
    for (kind, images, steps, arm), found in sorted(cells.items()):
        spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
        mean = statistics.mean(found)
        print(f"{kind:<26} ipc {images:<4} {steps:>6} steps  {arm:<40} {mean:5.1f}{spread}  ({len(found)} seeds)")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
