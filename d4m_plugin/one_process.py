"""Lightning's trainer where a training is one process's own, however many run the command."""

import signal
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from d4m_plugin.devices import this_device, trainer_precision


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
        plugins=[LightningEnvironment()],
        precision=trainer_precision(),
        limit_val_batches=0,
        logger=False,
        enable_model_summary=False,
        **options,
    )


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
