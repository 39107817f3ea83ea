"""Lightning's trainer where a training is one process's own, however many run the command."""

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from d4m_plugin.cache import written_whole
from d4m_plugin.devices import this_device, trainer_precision


class _WrittenWhole(TorchCheckpointIO):
    """Checkpoints that lie there whole or not at all: Lightning moves its own from the folder of temporary files."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint beside its place, and put it there."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with written_whole(Path(path)) as aside:
            super().save_checkpoint(checkpoint, aside, storage_options)


def own_trainer(max_steps: int, callbacks: Sequence[L.Callback], **options: Any) -> L.Trainer:
    """Return a trainer on this process's device, under torchrun and SLURM too, which does not validate.

    Args:
        max_steps: updates.
        callbacks: what is done beside.
        options: others of the Trainer.
    """
    return L.Trainer(
        max_steps=max_steps,
        callbacks=list(callbacks),
        devices=this_device(),
        plugins=[LightningEnvironment(), _WrittenWhole()],
        precision=trainer_precision(),
        limit_val_batches=0,
        logger=False,
        enable_model_summary=False,
        **options,
    )


def diverged(module: L.LightningModule) -> bool:
    """Whether a weight of a trained module is no number."""
    return not all(bool(each.isfinite().all()) for each in module.state_dict().values())


def fit(trainer: L.Trainer, module: L.LightningModule, **options: Any) -> None:
    """Train; Ctrl-C, which Lightning ends the process at, stays what it is, so that the command can say what is kept.

    Args:
        trainer: the trainer.
        module: what is trained.
        options: others of the trainer's `fit`.

    Raises:
        KeyboardInterrupt: at Ctrl-C.
    """
    try:
        trainer.fit(module, **options)
    except SystemExit as error:
        if error.code != 1:  # SIGTERM
            raise
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores further ones
        raise KeyboardInterrupt from error
