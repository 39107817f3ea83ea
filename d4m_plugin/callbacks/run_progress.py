"""One progress bar for a whole training run."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar

from d4m_plugin.progress import Progress

METRICS_EVERY = 20  # steps: reading a metric waits for the accelerator


class RunProgress(ProgressBar):
    """Shows the steps of the whole run, with rate and time left, where Lightning's own bar starts anew each epoch.

    An epoch of a distilled set may be one step.

    Args:
        description: what stands before the bar.
    """

    def __init__(self, description: str = "Training") -> None:
        super().__init__()
        self._description = description
        self._bar: Progress | None = None
        self._enabled = True

    def disable(self) -> None:
        """Show nothing: Lightning calls this on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show it again: Lightning calls this after a search for a learning rate or a batch size."""
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar."""
        if self._enabled:
            steps = trainer.estimated_stepping_batches
            total = None if steps == float("inf") else int(steps)
            self._bar = Progress(self._description, total, " steps", initial=trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Move on to the step reached."""
        if self._bar is None:
            return
        if trainer.global_step % METRICS_EVERY == 0:
            metrics = self.get_metrics(trainer, pl_module)
            self._bar.set_postfix({name: value for name, value in metrics.items() if name != "v_num"}, refresh=False)
        self._bar.update(trainer.global_step - self._bar.n)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the bar, so that the message starts a line of its own."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
