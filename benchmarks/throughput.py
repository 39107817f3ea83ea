"""What does training through Lightning and TeacherMatching cost beside a loop written by hand?

    python benchmarks/throughput.py

Both train the compiled ConvNet on batches of 100 random digits (32x32), cropped and mixed, with the embedded teacher:
the same arithmetic in the same process, in turns. Prints steps a second of each and their ratio.
"""

import logging
import statistics
import time
import warnings
from typing import Any

import lightning as L
import torch
from jsonargparse import auto_cli

from d4m_plugin import D4MDataModule, ImageClassifier, TeacherMatching
from d4m_plugin.devices import autocast, compute_dtype, default_device, trainer_precision
from d4m_plugin.matching import cutmix, matching_loss, soften
from d4m_plugin.models.classifier import decay_groups
from d4m_plugin.sources.images import squares_of
from d4m_plugin.teachers import load_teacher

WARM_UP = 10  # steps
TEMPERATURE = 20.0


class Clock(L.Callback):
    """Notes when the warm-up ended and when the training did."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Read the clock."""
        if trainer.global_step == WARM_UP:
            self.started = time.perf_counter()
        self.ended = time.perf_counter()


def through_lightning(data: D4MDataModule, steps: int) -> float:
    """Return steps a second."""
    clock = Clock()
    trainer = L.Trainer(
        max_steps=steps,
        precision=trainer_precision(),
        callbacks=[TeacherMatching(temperature=TEMPERATURE, compile_teacher=True), clock],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(ImageClassifier(data.num_classes, data.image_size, compile=True), datamodule=data)
    return (steps - WARM_UP) / (clock.ended - clock.started)


def by_hand(data: D4MDataModule, steps: int) -> float:
    """Return steps a second."""
    device = default_device()
    student = ImageClassifier(data.num_classes, data.image_size, compile=True).student.to(device)
    teacher = load_teacher("auto", data.source).to(device)
    teacher.model.to(memory_format=torch.channels_last).compile()
    optimizer = torch.optim.AdamW(decay_groups(student.parameters(), 0.01), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    pixels = squares_of(data.training_set, data.image_size).to(device)
    order, started = torch.empty(0, dtype=torch.int64), 0.0
    for step in range(steps):
        if step == WARM_UP:
            started = time.perf_counter()
        if len(order) < data.batch_size:
            order = torch.randperm(len(pixels))
        chosen, order = order[: data.batch_size], order[data.batch_size :]
        images = cutmix(data.augmented(pixels[chosen.to(device)])).images
        with autocast(device, compute_dtype(device)):
            logits = student(images)
        softened = soften(teacher(data.to_unit_range(images)), TEMPERATURE)
        loss = matching_loss(logits, softened, TEMPERATURE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return (steps - WARM_UP) / (time.perf_counter() - started)


def main(steps: int = 110, turns: int = 5, ipc: int = 100, batch_size: int = 100) -> None:
    """Take turns, then print the medians.

    Args:
        steps: of each turn, the first ten of which do not count.
        turns: of each.
        ipc: images per class: few make many epochs.
        batch_size: images a step.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    data = D4MDataModule(train_on="random", ipc=ipc, batch_size=batch_size)
    rates: dict[str, list[float]] = {"by hand": [], "through Lightning": []}
    for _ in range(turns):
        rates["by hand"].append(by_hand(data, steps))
        rates["through Lightning"].append(through_lightning(data, steps))
    for name, found in rates.items():
        print(f"{name:<18} {statistics.median(found):6.2f} steps/s  ({min(found):.2f} to {max(found):.2f})")
    ratios = [ours / plain for plain, ours in zip(*rates.values(), strict=True)]
    print(f"{'ratio':<18} {statistics.median(ratios):6.3f}  ({min(ratios):.3f} to {max(ratios):.3f}), {turns} turns")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
