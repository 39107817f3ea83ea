"""One training for each arm, kind of labels, student and seed, alike in all but the images; each is done once."""

import dataclasses
import json
import logging
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from d4m_plugin.cache import digest, resolve_cache_dir
from d4m_plugin.callbacks import TeacherMatching
from d4m_plugin.checking import check_least
from d4m_plugin.datamodules import D4MDataModule
from d4m_plugin.devices import default_device
from d4m_plugin.errors import InputError
from d4m_plugin.evaluation.arms import ARMS, Arm, Arms
from d4m_plugin.loading import Held
from d4m_plugin.models.classifier import ImageClassifier
from d4m_plugin.models.students import create_student
from d4m_plugin.one_process import diverged, fit, own_trainer
from d4m_plugin.progress import Progress
from d4m_plugin.screening import check_images, fingerprint_of_tests
from d4m_plugin.seeding import seed_of
from d4m_plugin.sources import Source
from d4m_plugin.sources.splits import counts_by_label
from d4m_plugin.subsets import Chosen, at_most
from d4m_plugin.teachers import teacher_digest
from d4m_plugin.units import Units, load_json, save_json

Labels = Literal["teacher", "hard"]
QUICK = 500  # steps
PAPER = 500  # passes over the distilled set
CURVE = 50  # points of a training curve
SLICE = 1000  # real training images, of all classes together, by which a learning rate is chosen
MOST_CLASSES = 100  # whose confusion is kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """What all trainings of an evaluation have in common, and in what they differ.

    Args:
        arms: what is trained on; `distilled` and `random` always are.
        labels: the teacher's (Training-Time Matching) or the images' own.
        students: `convnet`, or torchvision classifiers such as resnet18.
        seeds: trainings of each kind. A seed decides the student's weights, the batches, and the draw of random images.
        steps: updates of each training.
        batch_size: images a batch; no more than the distilled set has.
        learning_rates: of several, each arm gets the one that does best, at the first seed, on a slice of real training
            images that no arm trains on meanwhile; never on the test images.
        lr_smoothing: as ImageClassifier takes it.
        teacher: as TeacherMatching takes it.

    Raises:
        InputError: where a value cannot work.
    """

    arms: tuple[Arm, ...]
    labels: tuple[Labels, ...]
    students: tuple[str, ...]
    seeds: int
    steps: int
    batch_size: int
    learning_rates: tuple[float, ...]
    lr_smoothing: float = 1.0
    teacher: str

    def __post_init__(self) -> None:
        for name, known in (("arms", ARMS), ("labels", get_args(Labels))):
            given = getattr(self, name)
            if unknown := [each for each in given if each not in known]:
                raise InputError(f"`{name}` has {unknown[0]!r}; use {', '.join(known)}.")
        for name in ("labels", "students", "learning_rates"):
            if not getattr(self, name):
                raise InputError(f"`{name}` is empty; name at least one.")
        check_least(1, seeds=self.seeds, steps=self.steps, batch_size=self.batch_size, lr_smoothing=self.lr_smoothing)
        if wrong := [rate for rate in self.learning_rates if not rate > 0]:
            raise InputError(f"`learning_rates` has {wrong[0]}; they must be above 0.")
        always: tuple[Arm, ...] = ("distilled", "random")
        object.__setattr__(self, "arms", tuple(dict.fromkeys([*always, *self.arms])))


def called(teacher: str, source: Source) -> str:
    """Return what the report calls a teacher: `auto` by the name of the source's own, where it has one."""
    return source.teacher or teacher if teacher == "auto" else teacher


def steps_of(budget: str | int, images: int, batch_size: int) -> int:
    """Return the steps of a training on so many images in batches of a size.

    Raises:
        InputError: where the budget is neither `quick`, `paper` nor a number, or a batch holds nothing.
    """
    check_least(1, batch_size=batch_size)
    if budget == "quick":
        return QUICK
    if budget == "paper":
        return PAPER * math.ceil(images / batch_size)
    if not str(budget).isdecimal() or int(budget) < 1:
        raise InputError(f"`budget` is {budget!r}; use quick, paper, or a number of steps.")
    return int(budget)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training.

    Attributes:
        arm: what is trained on.
        labels: the teacher's or the images' own.
        student: its name.
        seed: of weights, batches and draw.
        lr: the first learning rate.
        choosing: whether it is tried on the slice of training images, to choose a learning rate, and not tested.
    """

    arm: Arm
    labels: Labels
    student: str
    seed: int
    lr: float
    choosing: bool = False

    def __str__(self) -> str:
        rate = f", rate {self.lr:g}" if self.choosing else ""
        return f"{self.student}, {self.arm}, {self.labels} labels, seed {self.seed}{rate}"


class Row(TypedDict):
    """What is kept of a training.

    Attributes:
        accuracy: share of the test images, or of the slice, that are named rightly; None of a training that diverged,
            of which the next two are None too.
        accuracies: the same of each class, None of one without test images.
        confusion: how many images of each class (a list each) are named as which; None of many classes.
        losses: [step, loss] of some steps; None in place of a loss that is no number.
        seconds: what it took.

    The others are the Run's.
    """

    arm: Arm
    labels: Labels
    student: str
    seed: int
    lr: float
    choosing: bool
    accuracy: float | None
    accuracies: list[float | None] | None
    confusion: list[list[int]] | None
    losses: list[list[float | None]]
    seconds: float


class Trainings:
    """The trainings of a protocol on the arms of a set.

    Args:
        arms: the images.
        protocol: the rest.
        folder: a file for each training that is done, by this protocol or another.
        compile: compile student and teacher.

    Raises:
        InputError: where an arm cannot be made.
    """

    def __init__(self, arms: Arms, protocol: Protocol, folder: Path, compile: bool = False) -> None:
        judged, source, test = arms.judged, arms.source, arms.source.test()
        batch_size = min(protocol.batch_size, len(judged.squares))  # of all arms alike, also those of more images
        self.arms, self.protocol, self.folder = arms, dataclasses.replace(protocol, batch_size=batch_size), folder
        self.compile = compile
        cache = resolve_cache_dir(arms.cache_dir)
        check_images(source, source.train(), "training images", source.fingerprint, cache, arms.num_workers)
        arms.check(protocol.arms)
        for student in protocol.students:
            create_student(student, len(source.classes), judged.image_size)  # whether it can be made
        if len(protocol.learning_rates) > 1 and not self._spare:
            raise InputError(
                f"`learning_rates` has {len(protocol.learning_rates)}, but a class has as many distilled images as "
                "real ones, so none is left to choose by; give one rate."
            )
        self._teacher = teacher_digest(protocol.teacher)
        self._decides = {
            "made with": [version("d4m-plugin"), version("torch"), default_device().type],
            "source": [source.fingerprint, list(source.classes)],
            "tested on": [fingerprint_of_tests(source, test), digest(np.asarray(test.targets).tolist())],
            "seen": [source.mean, source.std, source.flip, judged.image_size, judged.resize],
            "steps": protocol.steps,
            "batch_size": self.protocol.batch_size,
            "lr_smoothing": protocol.lr_smoothing,
        }

    def of_seeds(self, seeds: Sequence[int] | None = None) -> "list[Training]":
        """Return the trainings of some seeds, of all by default; the learning rates are chosen first.

        Args:
            seeds: the seeds.
        """
        protocol = self.protocol
        kinds = [
            Run(arm=arm, labels=labels, student=student, seed=0, lr=protocol.learning_rates[0])
            for student in protocol.students
            for labels in protocol.labels
            for arm in protocol.arms
        ]
        best = self._best_of(kinds) if len(protocol.learning_rates) > 1 else kinds
        seeds = range(protocol.seeds) if seeds is None else seeds
        return [Training(self, dataclasses.replace(kind, seed=seed)) for seed in seeds for kind in best]

    def _best_of(self, kinds: Sequence[Run]) -> list[Run]:
        """Return each kind of training with the learning rate that does best on the slice."""
        rates = self.protocol.learning_rates
        tries = [Training(self, dataclasses.replace(kind, lr=lr, choosing=True)) for kind in kinds for lr in rates]
        found = [-1.0 if row["accuracy"] is None else row["accuracy"] for row in trained(tries)]
        best = [max(range(len(rates)), key=found[start:].__getitem__) for start in range(0, len(found), len(rates))]
        return [dataclasses.replace(kind, lr=rates[place]) for kind, place in zip(kinds, best, strict=True)]

    def key(self, run: Run) -> str:
        """Return what names a training by all that decides its outcome."""
        teacher = self._teacher if run.labels == "teacher" else None
        decides = self._decides | {"set": self.arms.decided_by(run.arm), "teacher": teacher} | dataclasses.asdict(run)
        return digest([json.dumps(decides, sort_keys=True)])[:16]

    def train(self, run: Run, bar: Progress) -> dict[str, Any]:
        """Return what a training gave; the accuracy of one that diverged, to no numbers, is None."""
        bar.set_postfix_str(str(run))
        started = time.perf_counter()
        row = dataclasses.asdict(run) | self._train(run, bar)
        return row | {"seconds": round(time.perf_counter() - started, 1)}

    def _train(self, run: Run, bar: Progress) -> dict[str, Any]:
        judged, protocol = self.arms.judged, self.protocol
        images = (self._arms_beside_the_slice if run.choosing else self.arms).images(run.arm, run.seed)
        L.seed_everything(run.seed, verbose=False)  # after the images, whose making may draw
        data = D4MDataModule(
            self.arms.source,
            # Of "real", images are held in memory where they fit; of "random", in any case.
            train_on="real" if run.arm in ("real", "equal_bytes") else "random",
            batch_size=protocol.batch_size,
            num_workers=self.arms.num_workers,
            image_size=judged.image_size,
            resize=judged.resize,
            cache_dir=self.arms.cache_dir,
        )
        data.training_set = images
        student = ImageClassifier(
            data.num_classes, data.image_size, run.student, run.lr, protocol.lr_smoothing, compile=self.compile
        )
        curve = _Curve(protocol.steps, bar)
        teacher = protocol.teacher if run.labels == "teacher" else None
        callbacks = [TeacherMatching(teacher, compile_teacher=self.compile), curve]
        trainer = own_trainer(protocol.steps, callbacks, enable_checkpointing=False, enable_progress_bar=False)
        fit(trainer, student, datamodule=data)
        if curve.points[-1][1] is None or diverged(student):
            found = {"accuracy": None, "accuracies": None, "confusion": None}
        else:
            found = self._tested(run, student, data, trainer)
        return found | {"losses": curve.points}

    def _tested(self, run: Run, student: ImageClassifier, data: D4MDataModule, trainer: L.Trainer) -> dict[str, Any]:
        """Return what a student names of the test images, or of the slice, rightly."""
        tests = self._slice if run.choosing else self.arms.source.test()
        labels = torch.as_tensor(tests.targets, dtype=torch.int64)
        if run.choosing:
            data.held_test_set = Held(self._slice_squares, labels)
        named: Any = trainer.predict(student, datamodule=data)  # of each batch, int64 (B,)
        confusion = multiclass_confusion_matrix(torch.cat(named), labels, data.num_classes)
        right, there = confusion.diagonal().tolist(), confusion.sum(1).tolist()
        return {
            "accuracy": sum(right) / len(labels),
            "accuracies": [round(n / of, 4) if of else None for n, of in zip(right, there, strict=True)],
            "confusion": confusion.tolist() if data.num_classes <= MOST_CLASSES else None,
        }

    @cached_property
    def _slice(self) -> Chosen:
        """Real training images, as many of each class, by which learning rates are chosen."""
        train, classes = self.arms.source.train(), len(self.arms.source.classes)
        smallest = min(counts_by_label(train.targets, classes))
        per_class = max(1, min(SLICE // classes, smallest // 5, self._spare))
        return at_most(train, per_class, seed_of(-1))  # a draw of its own, whatever the seeds of the arms

    @property
    def _spare(self) -> int:
        """How many real training images each class has at least beside as many as are distilled."""
        distilled = self.arms.judged.counts
        there = counts_by_label(self.arms.source.train().targets, len(distilled))
        return min(real - made for real, made in zip(there, distilled, strict=True))

    @cached_property
    def _slice_squares(self) -> Tensor:
        return self.arms.squares_of(self._slice)

    @cached_property
    def _arms_beside_the_slice(self) -> Arms:
        return dataclasses.replace(self.arms, left_out=torch.from_numpy(self._slice.indices))


@dataclasses.dataclass(frozen=True)
class Training:
    """One of some trainings, which its file is named after.

    Attributes:
        of: the trainings.
        run: which.
    """

    of: Trainings
    run: Run

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{self.of.key(self.run)}.json"


def trained(trainings: Sequence[Training]) -> list[Row]:
    """Return what each training gave.

    Args:
        trainings: of one folder; those that are not done are made by this process and all that share it.
    """
    folder = trainings[0].of.folder
    folder.mkdir(parents=True, exist_ok=True)
    by_file = {training.file: training for training in trainings}
    steps = {file: training.of.protocol.steps for file, training in by_file.items()}
    with (
        _quiet(),
        Progress("Training", sum(steps.values()), " steps") as bar,
        Units(folder, steps, _read_row, bar) as units,
    ):
        for free in units.rounds():
            for file in free:
                save_json(folder / file, by_file[file].of.train(by_file[file].run, bar))
    return [_read_row(folder / training.file) for training in trainings]


def _read_row(path: Path) -> Row:
    return load_json(path, Row)


class _Curve(L.Callback):
    """Notes the loss of some steps, and moves the bar of all trainings on."""

    def __init__(self, steps: int, bar: Progress) -> None:
        self.every, self.bar = max(1, steps // CURVE), bar
        self.points: list[list[float | None]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any) -> None:
        """Note a step, and the last in any case."""
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            loss = float(outputs["loss"] if isinstance(outputs, dict) else outputs)
            self.points.append([trainer.global_step, float(f"{loss:.4g}") if math.isfinite(loss) else None])
        self.bar.update(1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning from saying of each training what it says of one."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        logger.setLevel(level)
