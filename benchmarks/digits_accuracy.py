"""Is the distilled set of the digits better than as many random real ones, trained on the same way?

    python benchmarks/digits_accuracy.py --output digits_accuracy.jsonl

Every run is the default command's: same student, teacher, steps and augmentation; only the images differ. A seed
decides the drawn or distilled images, the student's initial weights and the batches. The last step counts.
"""

import argparse
import json
import logging
import statistics
import time
import warnings
from pathlib import Path

import lightning as L

from d4m_plugin import D4MDataModule, ImageClassifier, TeacherMatching
from d4m_plugin.devices import trainer_precision
from d4m_plugin.lightning_cli import DEFAULT_STEPS


def accuracy(train_on: str, ipc: int, seed: int, steps: int, **recipe: float) -> float:
    """Return the accuracy of one run on the 500 real test digits."""
    L.seed_everything(seed, verbose=False)
    data = D4MDataModule(train_on=train_on, ipc=ipc, seed=seed, **recipe)
    student = ImageClassifier(data.num_classes, data.image_size)
    trainer = L.Trainer(
        max_steps=steps,
        precision=trainer_precision(),
        callbacks=[TeacherMatching()],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(student, datamodule=data)
    return trainer.test(student, datamodule=data, verbose=False)[0]["test_accuracy"]


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("digits_accuracy.jsonl"))
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ipc", type=int, nargs="+", default=[1, 10])
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")

    arms = [(arm, ipc) for ipc in options.ipc for arm in ("distilled", "random")] + [("real", 0)]
    rows = [json.loads(line) for line in options.output.read_text().splitlines()] if options.output.exists() else []
    done = {(row["arm"], row["ipc"], row["seed"], row["steps"]): row["accuracy"] for row in rows}
    for seed in range(options.seeds):
        for arm, ipc in arms:
            key = (arm, ipc, seed, options.steps)
            if key in done:
                continue
            started = time.perf_counter()
            done[key] = accuracy(arm, ipc or 1, seed, options.steps)
            row = {"arm": arm, "ipc": ipc, "seed": seed, "steps": options.steps, "accuracy": done[key]}
            row["seconds"] = round(time.perf_counter() - started, 1)
            with options.output.open("a") as file:
                file.write(f"{json.dumps(row)}\n")
            print(row, flush=True)

    print(f"\n{options.steps} steps, {options.seeds} seeds, 500 test images, %")
    for arm, ipc in arms:
        found = [100 * done[arm, ipc, seed, options.steps] for seed in range(options.seeds)]
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        name = f"{arm}, ipc {ipc}" if ipc else "all real"
        print(f"{name:<20}{statistics.mean(found):6.1f} ± {spread:.1f}")


if __name__ == "__main__":
    main()
