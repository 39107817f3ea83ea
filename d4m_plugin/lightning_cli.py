"""LightningCLI with our defaults: what `fit`, `validate`, `test` and `predict` run."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden

from d4m_plugin.callbacks import RunProgress, TeacherMatching
from d4m_plugin.cli import OneSentenceErrors, table
from d4m_plugin.datamodules import D4MDataModule
from d4m_plugin.devices import trainer_precision

DEFAULT_STEPS = 1000


class Parser(OneSentenceErrors, LightningArgumentParser):
    """LightningCLI's, with our errors."""


class D4MCLI(LightningCLI):
    """LightningCLI whose model, data, teacher and training have defaults, so that `fit` alone runs whole."""

    def __init__(self) -> None:
        super().__init__(
            trainer_defaults={
                "max_steps": DEFAULT_STEPS,
                "check_val_every_n_epoch": None,  # an epoch of a distilled set may be one step: count steps
                "val_check_interval": DEFAULT_STEPS // 4,
                "precision": trainer_precision(),
                "log_every_n_steps": 20,
            },
            seed_everything_default=0,
            parser_class=Parser,
            save_config_kwargs={"overwrite": True},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the teacher's options, our defaults, and what the model learns of the data."""
        parser.add_lightning_class_args(TeacherMatching, "matching")
        parser.set_defaults(
            {
                "model": {"class_path": "d4m_plugin.ImageClassifier"},
                "data": {"class_path": "d4m_plugin.D4MDataModule"},
            }
        )
        for name in ("num_classes", "image_size"):
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Show the whole run on one bar, unless the user has a bar or wants none."""
        trainer = self._get(self.config_init, "trainer", {})
        callbacks = trainer.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        bars = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if trainer.get("enable_progress_bar") is not False and not bars:
            kwargs["callbacks"] = [*callbacks, RunProgress()]
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        """Measure the student on the real test images, and say what there is now and what to do next."""
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning sets it from its argument
            return
        if is_overridden("test_step", self.model):
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        if self.trainer.is_global_zero:
            print(f"\n{table(self._results())}")

    def _results(self) -> dict[str, Any]:
        rows: dict[str, Any] = {
            f"{name.removeprefix('test_')} on real test images": f"{value:.2%}" if "acc" in name else f"{value:.4g}"
            for name, value in self.trainer.callback_metrics.items()
            if name.startswith("test_")
        }
        data = self.datamodule
        if isinstance(data, D4MDataModule) and data.train_on == "distilled":
            rows["distilled set"] = data.distilled.root
            rows["preview"] = data.distilled.preview
        checkpoint = self.trainer.checkpoint_callback
        if isinstance(checkpoint, ModelCheckpoint):
            rows["checkpoint"] = checkpoint.best_model_path
        if isinstance(data, D4MDataModule) and data.train_on == "distilled":
            rows["next"] = f"lightning fit --data D4MDataModule --data.train_on random --data.ipc {data.recipe.ipc}"
            rows[""] = "(the same training on as many real images: is the distilled set better?)"
        return rows
