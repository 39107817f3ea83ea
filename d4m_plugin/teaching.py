"""Train a teacher on all real images of a small source."""

import tempfile
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torchmetrics import Metric

from d4m_plugin.cache import written_whole
from d4m_plugin.callbacks import RunProgress
from d4m_plugin.datamodules import D4MDataModule
from d4m_plugin.models.classifier import ImageClassifier
from d4m_plugin.one_process import fit, own_trainer
from d4m_plugin.sources import Source
from d4m_plugin.teachers import save_teacher

BATCH = 100  # images, as the paper trains students
EPOCHS = 24  # where a ConvNet on CIFAR-10 is within some points of its best
LEAST_STEPS = 2000


class _DataOfOneProcess(D4MDataModule):
    """Real images, without the hook at which Lightning has all processes of a group meet."""

    prepare_data = L.LightningDataModule.prepare_data


def train_teacher(source: Source, output: Path, cache_dir: str | Path | None = None) -> None:
    """Train the default student on all real images and their labels, and write it as a teacher.

    The same as `train_on: real` with the default model. The random state of the caller stays as it is. Where the caller
    is one of a process group, as on several devices, the others wait for the file: so nothing here waits for them.

    Args:
        source: the real images.
        output: the .safetensors file to write.
        cache_dir: as for D4MDataModule.
    """
    with isolate_rng():
        torch.manual_seed(0)  # Lightning's seed_everything would outlast this, in the environment
        data = _DataOfOneProcess(source, train_on="real", batch_size=BATCH, cache_dir=cache_dir)
        module = ImageClassifier(data.num_classes, data.image_size)
        for part in module.modules():
            if isinstance(part, Metric):
                part.distributed_available_fn = lambda: False
        steps = max(LEAST_STEPS, EPOCHS * len(source.train()) // BATCH)
        # Once, even where several processes train the student.
        trainer = own_trainer(steps, [RunProgress(f"Teacher of {source.name}")], enable_checkpointing=False)
        fit(trainer, module, datamodule=data)
        with tempfile.TemporaryDirectory() as folder, written_whole(output) as path:
            trainer.save_checkpoint(f"{folder}/teacher.ckpt")
            save_teacher(Path(folder) / "teacher.ckpt", path)
