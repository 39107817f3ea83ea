"""LightningCLI with our defaults: what `fit`, `validate`, `test` and `predict` run."""

import csv
import inspect
import itertools
import json
import math
import os
import re
import shlex
import sys
import warnings
from pathlib import Path
from pickle import UnpicklingError
from pydoc import locate
from typing import Any

import lightning as L
import torch
from jsonargparse.typing import register_type
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from d4m_plugin.callbacks import RunProgress, TeacherMatching
from d4m_plugin.callbacks.teacher_matching import STORED
from d4m_plugin.console import OneSentenceErrors, table
from d4m_plugin.datamodules import D4MDataModule
from d4m_plugin.devices import trainer_precision
from d4m_plugin.distilled import DistilledDataset
from d4m_plugin.errors import InputError, InputWarning
from d4m_plugin.hub import TRANSFORMERS
from d4m_plugin.models.classifier import ImageClassifier

DEFAULT_CLASSES = {"model": "d4m_plugin.ImageClassifier", "data": "d4m_plugin.D4MDataModule"}
DEFAULT_STEPS = 500
LOG_EVERY = 20  # steps
OFFERED = ("num_classes", "image_size")  # what a model learns of the data, where it takes it

# Warnings that our defaults cause, or Lightning 2.6 beside torch 2.14: nothing that a user could act on.
BESIDE_THE_POINT = (
    "Starting from v1.9.0, `tensorboardX` has been removed",
    "Precision bf16-mixed is not supported by the model summary",
    "The number of training batches .* is smaller than the logging interval",  # an epoch may be one step
    "The dirpath has changed from",  # testing a checkpoint opens a log folder of its own
    ".*isinstance\\(treespec, LeafSpec\\)",
)


register_type(torch.device, str, torch.device)  # of SWA, whose saved configuration could not be read back


class Parser(OneSentenceErrors, LightningArgumentParser):
    """LightningCLI's, with our errors."""

    def add_lightning_class_args(
        self, lightning_class: Any, nested_key: str, subclass_mode: bool = False, required: bool = True
    ) -> list[str]:
        """Require no class: each has a default."""
        return super().add_lightning_class_args(lightning_class, nested_key, subclass_mode, required=False)


class D4MCLI(LightningCLI):
    """LightningCLI whose model, data, teacher and training have defaults, so that `fit` alone runs whole."""

    def __init__(self) -> None:
        for message in BESIDE_THE_POINT:
            warnings.filterwarnings("ignore", message)
        # No interval by itself, so that one of 1, which is Lightning's, is known to be asked for.
        ours = {"precision": trainer_precision(), "log_every_n_steps": LOG_EVERY, "check_val_every_n_epoch": None}
        super().__init__(
            trainer_defaults=ours,
            seed_everything_default=0,
            parser_class=Parser,
            save_config_kwargs={"overwrite": True},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the teacher's options, our defaults, and what the model learns of the data."""
        parser.add_lightning_class_args(TeacherMatching, "matching")
        parser.set_defaults({part: {"class_path": path} for part, path in DEFAULT_CLASSES.items()})
        for name in OFFERED:
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse what is given alone first, and then all, with defaults of the classes that are given.

        jsonargparse would hand what the default class takes on to one named in its place: our `lr` to another's module.
        """
        words = sys.argv[1:] if args is None else list(args)
        silent = [word for word in words if not word.startswith("--print_config")]
        given = parser.parse_args(silent, defaults=False)
        self._given = given[given.subcommand]
        unlike_defaults = any(word.startswith("--print_config=") and "skip_default" in word for word in words)
        for part in DEFAULT_CLASSES:
            if path := self._given.get(f"{part}.class_path"):
                default = None if unlike_defaults else {"class_path": path}  # which would not be printed
                self._subcommand_parsers[given.subcommand].set_defaults({part: default})
        super().parse_arguments(parser, args)
        if self.config[given.subcommand].model is None:
            raise InputError("`model` is null; name a class, or leave it out for an ImageClassifier.")

    def _parse_ckpt_path(self) -> None:
        """Take from a checkpoint how its module was made, where it is not given: Lightning would take all.

        Raises:
            InputError: where the module that is given is another.
        """
        subcommand, given = self.config.subcommand, self._given.get("model")
        options = self.config[subcommand]
        try:
            super()._parse_ckpt_path()
        except UnpicklingError:  # of more than tensors and numbers, which Lightning reads here from no file
            if options.weights_only is not False:
                raise
            return
        if given and options.ckpt_path:
            found = self.config[subcommand].model.class_path
            if locate(found) is not locate(given.class_path):
                raise InputError(
                    f"`ckpt_path` names a checkpoint of {found}, but `model` is {given.class_path}; name {found} as "
                    "`model`."
                )
            self.config = self.parser.parse_object({subcommand: {"model": given}}, self.config)

    @property
    def _options(self) -> Any:
        """The options of the command, defaults filled in and classes instantiated."""
        return self.config_init[self.subcommand]

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Fill in how long to train, how often to validate and how to show it, where the user does not say."""
        options = self._options.trainer
        if options["max_steps"] == -1 and options["max_epochs"] is None and options["max_time"] is None:
            kwargs["max_steps"] = DEFAULT_STEPS
        if options["check_val_every_n_epoch"] is None and isinstance(options["val_check_interval"], float):
            kwargs["check_val_every_n_epoch"] = 1  # a share of an epoch
        elif options["check_val_every_n_epoch"] is None and options["val_check_interval"] is None:
            kwargs["val_check_interval"] = DEFAULT_STEPS // 2  # across epochs: one of a distilled set may be one step
        callbacks = options["callbacks"] or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        wants_bar = options["enable_progress_bar"] is not False and not options["barebones"]
        if self.subcommand == "fit" and wants_bar and not has_bar:
            kwargs["callbacks"] = [*callbacks, RunProgress()]
        if options["barebones"] and options["log_every_n_steps"] == LOG_EVERY:
            kwargs["log_every_n_steps"] = None  # it logs nothing, and refuses our default
        try:
            return super().instantiate_trainer(**kwargs)
        except ValueError as error:
            raise InputError(str(error)) from error

    def instantiate_classes(self) -> None:
        """Leave out of a module's saved hyperparameters what we offered and it does not take.

        Lightning 2.6 puts them there, and could not read the checkpoint back.
        """
        super().instantiate_classes()
        takes = inspect.signature(type(self.model)).parameters
        if not any(each.kind is each.VAR_KEYWORD for each in takes.values()):
            for name in set(OFFERED) - takes.keys():
                self.model.hparams.pop(name, None)

    def before_fit(self) -> None:
        """Refuse a checkpoint that is not there, and batches that our own module does not take."""
        keys = isinstance(self.datamodule, D4MDataModule) and self.datamodule.batch_keys
        if keys and type(self.model) is ImageClassifier:
            raise InputError(f"`batch_keys` is {keys}, but an ImageClassifier takes batches as tuples; leave it out.")
        path = str(self._options.ckpt_path or "")
        found_by_lightning = path in ("", "last", "hpc") or path.startswith("registry") or "://" in path
        if not found_by_lightning and not Path(path).expanduser().exists():
            raise InputError(f"`ckpt_path` is {path!r}, and there is no such file.")

    def before_test(self) -> None:
        """Refuse to measure weights that nothing has trained."""
        self.before_fit()
        if isinstance(self.model, ImageClassifier) and not self._options.ckpt_path:
            raise InputError(
                "`ckpt_path` is missing: an ImageClassifier has random weights without one; name the last.ckpt of a "
                "run of `lightning fit`."
            )

    before_validate = before_test

    def before_predict(self) -> None:
        """Refuse a module that would be given labels with the images."""
        self.before_test()
        data = self.datamodule
        if isinstance(data, D4MDataModule) and not data.batch_keys and not is_overridden("predict_step", self.model):
            raise InputError(
                f"{type(self.model).__name__} has no `predict_step`; give it one that takes a batch of images and "
                "labels, and returns the labels that it finds."
            )

    def after_fit(self) -> None:
        """Measure the student on the real test images, and say what there is now and what to do next."""
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning sets it from its argument
            return
        rows: dict[str, Any] = {}
        checkpoint = self.trainer.checkpoint_callback
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.dirpath:
            # Lightning's own are of the last validation; what is measured here is of the last step.
            rows["checkpoint"] = self._unused(checkpoint)
            self.trainer.save_checkpoint(rows["checkpoint"], weights_only=False)
        rows = self._measured() | rows | self._what_next(rows.get("checkpoint"))
        if self.trainer.is_global_zero and rows:
            print(f"\n{table(rows)}")

    def _unused(self, checkpoint: ModelCheckpoint) -> Path:
        """Return last.ckpt in a callback's folder; last-v1.ckpt and so on, as Lightning, where it is another run's."""
        own = {checkpoint.last_model_path, str(self._options.ckpt_path or "")}
        own = {os.path.realpath(each) for each in own if each}
        versions = itertools.chain([""], (f"-v{number}" for number in itertools.count(1)))
        paths = (Path(str(checkpoint.dirpath)) / f"last{version}.ckpt" for version in versions)
        return next(
            path
            for path in paths
            if os.path.realpath(path) in own or not checkpoint.file_exists(str(path), self.trainer)
        )

    def _measured(self) -> dict[str, Any]:
        """Return what the module itself logs of the real test images: all sources validate on them too."""
        if not isinstance(self.datamodule, D4MDataModule):
            return {}
        if is_overridden("test_step", self.model):
            measure: Any = self.trainer.test
        elif is_overridden("validation_step", self.model):
            measure = self.trainer.validate
        else:
            return {}
        found = measure(self.model, datamodule=self.datamodule, verbose=False)  # nothing of no batches
        return {_row_name(name): _shown(name, value) for metrics in found for name, value in metrics.items()}

    def _what_next(self, checkpoint: Path | None) -> dict[str, Any]:
        data, log_dir = self.datamodule, self.trainer.log_dir  # read by every rank: it is broadcast
        if not isinstance(data, D4MDataModule):
            return {}
        again = f"lightning fit --config {shlex.quote(f'{log_dir}/config.yaml')}"
        if self._options.ckpt_path:
            again += " --ckpt_path null"  # else it would go on with this student
        if data.train_on == "distilled":
            found = data.training_set
            rows: dict[str, Any] = {"distilled set": data.hub_id}
            if isinstance(found, DistilledDataset):
                rows = {"distilled set": found.root, "preview": found.preview}
            return rows | {
                "next": " ".join([again, *self._for_as_many_random(data)]),
                "": "(the same training on as many real images: is the distilled set better?)",
            }
        if data.train_on == "real" and checkpoint and isinstance(self.model, ImageClassifier):
            teacher = shlex.quote(str(checkpoint))
            return {"as a teacher": f"{again} --data.train_on distilled --matching.teacher {teacher}"}
        return {}

    def _for_as_many_random(self, data: D4MDataModule) -> list[str]:
        """Return the options that make a training on a distilled set one on as many random real images."""
        options = ["--data.train_on random", f"--data.ipc {math.ceil(len(data.training_set) / data.num_classes)}"]
        if data.image_size != data.source.image_size:
            options.append(f"--data.image_size {data.image_size}")
        if data.resize != data.recipe.resize:
            options.append(f"--data.resize {data.resize}")
        teachers = [str(each) for each in self._options.matching.teachers]
        if STORED in teachers:
            stored = data.distilled.metadata["labels"]["teacher"]
            if stored.endswith((".ckpt", ".safetensors")) or (stored.startswith(TRANSFORMERS) and "/" not in stored):
                stored = "TEACHER"  # where it lies is not recorded
            teachers = [stored if each == STORED else each for each in teachers]
            given = teachers[0] if len(teachers) == 1 else json.dumps(teachers)
            options.append(f"--matching.teacher {shlex.quote(given)}")
        if data.weighting != "uniform":
            options.append("--data.weighting uniform")
        if data.push:
            options.append("--data.push false")
        return options

    def predict(self, **kwargs: Any) -> None:
        """Write the label predicted of each real test image to predictions.csv in the log folder."""
        if self.trainer.world_size > 1:
            raise InputError(f"`devices` makes {self.trainer.world_size} processes; predict writes one file: use 1.")
        predicted: Any = self.trainer.predict(**kwargs)
        if not predicted or not isinstance(self.datamodule, D4MDataModule):
            return
        names = self.datamodule.source.classes
        shapes = {batch.shape[1:] if isinstance(batch, Tensor) else None for batch in predicted}
        if shapes == {(len(names),)}:
            predicted = [logits.argmax(1) for logits in predicted]
        elif shapes != {()}:
            warnings.warn(
                f"`predict_step` of {type(self.model).__name__} returns neither a label nor {len(names)} logits of "
                "each image, so that no predictions.csv is written.",
                InputWarning,
                stacklevel=2,
            )
            return
        path, labels = Path(self.trainer.log_dir or ".") / "predictions.csv", torch.cat(predicted).tolist()
        images = self.datamodule.source.test()
        keys = getattr(images, "keys", None)
        known_by = list(map(os.fsdecode, keys)) if isinstance(keys, list) else [""] * len(images)  # of other sources
        rows = zip(known_by, labels, images.targets, strict=False)  # a trial run predicts the first few
        with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(("index", "image", "label", "class", "true label"))
            writer.writerows(
                (index, image, label, names[label], true) for index, (image, label, true) in enumerate(rows)
            )
        print(table({"predictions": path}))


def _row_name(metric: str) -> str:
    return f"{re.sub('^(test|val)[_/]', '', metric)} on real test images"


def _shown(metric: str, value: float) -> str:
    return f"{value:.2%}" if "acc" in metric and value <= 1 else f"{value:.4g}"  # some log per cent
