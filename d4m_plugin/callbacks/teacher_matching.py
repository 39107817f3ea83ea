"""Training-Time Matching for any LightningModule (D4M, section 3.3)."""

import copy
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from d4m_plugin.datamodules import D4MDataModule
from d4m_plugin.errors import InputError, InputWarning, first_line
from d4m_plugin.logits import LogitsHook, all_logits, source_of_logits
from d4m_plugin.matching import MIXINGS, Mixed, matching_loss, soften
from d4m_plugin.teachers import Teacher, name_of, tried_teacher

AT_THE_START = ("on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start")
STORED = "stored"  # the teacher whose logits are in the set


class TeacherMatching(L.Callback):
    """Make a LightningModule learn from a teacher in place of the labels, its code unedited.

    While fitting, each batch is mixed and goes through the module's own `training_step`; the student's logits are
    taken from the first forward pass that it makes there with gradients, and the loss that it returns is replaced by
    the one of matching the teacher, which sees the batch as the step gets it. The module's own metrics go on: they get
    integer labels, those of the larger part of each mixed image. The teacher is held here alone: no part of it is in
    the module, its checkpoint or its optimiser.

    Args:
        teacher: `auto` for the source's own, or one trained on its real images once where it is small;
            `torchvision:NAME`, `timm:NAME` or `transformers:ID`, a pretrained classifier; a checkpoint (.ckpt) of a run
            with `train_on: real`; `stored`, the logits that `d4m relabel` wrote into the set, of whole images, whatever
            is cropped of them; a list of these, whose softened outputs are averaged; or null to leave the module's own
            loss and batches alone. In Python, a Teacher too, or another module that takes the same input as the
            student, of which a copy teaches.
        temperature: T, by which the logits of both are divided, above 0.
        mixing: `cutmix` (the paper's), `mixup` or `none`.
        loss: `kl` of the softened outputs (the paper's, equation 8), or `mse` of the logits, which knows no
            temperature (as EDC, arXiv:2404.13733, and later work).
        scale_by_temperature: multiply the KL by T², so that its gradient does not depend on T (Hinton et al.,
            arXiv:1503.02531); the paper does not.
        hard_label_weight: of the cross entropy with the labels, mixed as the images are, that is added to the loss.
        student: the submodule that returns the logits, such as `model`; by default the outermost that does.
        compile_teacher: compile the teachers with `torch.compile`, channels last: some seconds first, then the embedded
            ones take a third of the time on a CPU and a ResNet half, which needs a C++ compiler.

    Raises:
        InputError: where an option cannot work, the teacher is unknown, has other classes or is at chance on real
            images, the data is not a D4MDataModule, the module optimises manually, no logits are seen, or processes
            would wait for the gradients of parameters that have no part in them.
    """

    def __init__(
        self,
        teacher: str | Path | nn.Module | Sequence[str | Path | nn.Module] | None = "auto",
        temperature: float = 20.0,
        mixing: Literal["cutmix", "mixup", "none"] = "cutmix",
        loss: Literal["kl", "mse"] = "kl",
        scale_by_temperature: bool = False,
        hard_label_weight: float = 0.0,
        student: str | None = None,
        compile_teacher: bool = False,
    ) -> None:
        if mixing not in MIXINGS:
            raise InputError(f"`mixing` is {mixing!r}; use {', '.join(MIXINGS)}.")
        if loss not in ("kl", "mse"):
            raise InputError(f"`loss` is {loss!r}; use kl or mse.")
        if not 0 < temperature < math.inf:
            raise InputError(f"`temperature` is {temperature}; it must be above 0.")
        if not 0 <= hard_label_weight < math.inf:
            raise InputError(f"`hard_label_weight` is {hard_label_weight}; it must be at least 0.")
        if isinstance(teacher, str | list | tuple) and not teacher:
            raise InputError(f"`teacher` is {teacher!r}; name one, or null for the labels alone.")
        self.teachers: list[str | Path | nn.Module] = []
        if teacher is not None:
            self.teachers = [teacher] if isinstance(teacher, str | Path | nn.Module) else list(teacher)
        self.temperature, self.mixing, self.loss = temperature, mixing, loss
        self.scale_by_temperature, self.hard_label_weight = scale_by_temperature, hard_label_weight
        self.student, self.compile_teacher = student, compile_teacher
        self._loaded: list[Teacher] = []
        self._hook: LogitsHook | None = None
        self._restore: Callable[[], None] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Load the teachers, and wrap the module's training step."""
        if stage != "fit" or not self.teachers:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it in fit and declares it nowhere
        if not isinstance(data, D4MDataModule):
            raise InputError(f"TeacherMatching needs a D4MDataModule as `data`; it is {type(data).__name__}.")
        self._check_optimises_itself(pl_module)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it, and declares it nowhere
        if any(isinstance(each, TeacherMatching) and each._restore for each in callbacks):
            raise InputError("two callbacks are TeacherMatching; use one, with a list of teachers as `teacher`.")
        found = None  # until the first step, where layers may be made late
        if not (is_overridden("setup", pl_module) or is_overridden("configure_model", pl_module)):
            found = self._tried(pl_module, data)  # all its layers are there by now
        data.give_logits(STORED in self.teachers)
        named = [teacher for teacher in self.teachers if teacher != STORED]
        with torch.random.fork_rng(devices=[]):  # a seed gives the same batches, whatever the teacher
            device = trainer.strategy.root_device
            tried = [tried_teacher(each, data.source, data.cache_dir, device, data.image_size) for each in named]
        for name, (_, how_good) in zip(named, tried, strict=True):
            rank_zero_info(f"Teacher {name_of(name)}: {how_good}.")
        self._loaded = [teacher for teacher, _ in tried]
        if found is not None:
            self._hook = LogitsHook(pl_module.get_submodule(found))
        self._wrap(pl_module, data)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse what the module's own setup made unfit, and compile the teachers."""
        if self._restore:
            self._check_optimises_itself(pl_module)
        for teacher in self._loaded if self.compile_teacher else ():
            teacher.model.to(memory_format=torch.channels_last)
            teacher.model.compile()  # in place

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Name the parameters for whose gradients processes would wait for ever."""
        waiting = trainer.strategy.model  # of the strategies, only DDP wraps the module so
        if not self._restore or trainer.global_step > 0 or not isinstance(waiting, DistributedDataParallel):
            return
        unused = [name for name, p in pl_module.named_parameters() if p.requires_grad and p.grad is None]
        if unused and not (waiting.find_unused_parameters or waiting.static_graph):
            raise InputError(
                f"{len(unused)} parameters of {type(pl_module).__name__} have no part in its logits, such as "
                f"{unused[0]!r}; set `strategy` (`--trainer.strategy`) to ddp_find_unused_parameters_true."
            )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the module its own training step back."""
        self._unwrap()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the module its own training step back."""
        self._unwrap()

    def _tried(self, pl_module: L.LightningModule, data: D4MDataModule) -> str | None:
        """Return which submodule returns the logits, by a step of a copy on two black images.

        So a wrong `student` is known before any long work. None where the step needs its trainer: training tells.

        Warns:
            InputWarning: where the step fails in another way.
        """
        images = torch.zeros(2, 3, data.image_size, data.image_size)
        labels = torch.zeros(2, dtype=torch.int64)
        if self.student is not None:
            self._check_is_there(pl_module, self.student)
        try:
            with torch.enable_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
                copied = copy.deepcopy(pl_module).cpu()
                step = functools.partial(type(copied).training_step, copied)  # not one set on the instance
                read = copied.on_before_batch_transfer((images.to(torch.uint8), labels), 0)
                batch = copied.on_after_batch_transfer(data.packed(read[0].float(), read[1]), 0)
                takes_index = is_param_in_hook_signature(copied.training_step, "batch_idx", min_args=2)
                with all_logits(copied, (2, data.num_classes)) as seen:
                    result = step(batch, 0) if takes_index else step(batch)
        except Exception as error:
            # A copy has no trainer, nor what hangs on it, nor what a hook of the training's start makes.
            missing = any(each in str(error) for each in ("not attached to a `Trainer`", "'NoneType' object"))
            if not missing and not any(is_overridden(hook, pl_module) for hook in AT_THE_START):
                rank_zero_warn(
                    f"a trial of the training step of {type(pl_module).__name__}, on two black images, failed "
                    f"({type(error).__name__}: {first_line(error)}); the training will where that is not the trial's.",
                    category=InputWarning,
                )
            return self.student
        if result is None:  # it skips the batch
            return self.student
        return self._chosen(seen, pl_module, (2, data.num_classes))

    def _check_optimises_itself(self, pl_module: L.LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise InputError(
                f"{type(pl_module).__name__} has `automatic_optimization` set to False, so TeacherMatching cannot "
                "replace its loss; use a module that returns its loss from `training_step`."
            )

    def _check_is_there(self, pl_module: L.LightningModule, name: str) -> None:
        try:
            pl_module.get_submodule(name)
        except AttributeError as error:
            names = ", ".join(name for name, _ in pl_module.named_children())
            raise InputError(
                f"`student` is {name!r}, which {type(pl_module).__name__} does not have; it has {names}."
            ) from error

    def _chosen(self, seen: list[tuple[str, Tensor]], pl_module: L.LightningModule, shape: tuple[int, int]) -> str:
        if self.student in dict(seen):
            return self.student
        if self.student:
            self._check_is_there(pl_module, self.student)
        elif (found := source_of_logits(seen)) is not None:
            return found
        raise self._nothing_seen(pl_module, shape)

    def _nothing_seen(self, pl_module: L.LightningModule, shape: tuple[int, int]) -> InputError:
        where = f"its submodule {self.student!r}" if self.student else "it or a submodule of it"
        return InputError(
            f"TeacherMatching saw no logits of shape {shape} returned by {where} in the training step of "
            f"{type(pl_module).__name__}; set `student` (`--matching.student`) to the submodule that returns them."
        )

    def _wrap(self, pl_module: L.LightningModule, data: D4MDataModule) -> None:
        own_step = pl_module.training_step

        @functools.wraps(own_step)
        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            images, labels = data.unpacked(batch)
            mixed = MIXINGS[self.mixing](images)
            # The step may change its batch in place: the teacher sees it first, and the loss has labels of its own.
            target = self._target(mixed, data)
            batch = data.repacked(batch, mixed.images, mixed.labels(labels.clone()))
            shape = (len(images), data.num_classes)
            if self._hook:
                self._hook.expect(shape)
                result = own_step(batch, *args, **kwargs)
                student = self._hook.take()
                if result is None:  # it skips the batch
                    return None
            else:  # the first step, of a module that could not be tried before
                with all_logits(pl_module, shape) as seen:
                    result = own_step(batch, *args, **kwargs)
                if result is None:
                    return None
                found = self._chosen(seen, pl_module, shape)
                student = next(logits for name, logits in seen if name == found)
                self._hook = LogitsHook(pl_module.get_submodule(found))
            if student is None:
                raise self._nothing_seen(pl_module, shape)
            loss = self._loss(student, target, mixed, labels)
            pl_module.log("matching_loss", loss.detach(), prog_bar=True)
            return {**result, "loss": loss} if isinstance(result, dict) else loss

        own_attribute = vars(pl_module).get("training_step")
        pl_module.training_step = training_step  # type: ignore[method-assign]  # on the instance: its class stays as it is

        def restore() -> None:
            data.give_logits(False)
            del pl_module.training_step
            if own_attribute is not None:
                pl_module.training_step = own_attribute  # type: ignore[method-assign]

        self._restore = restore

    def _target(self, mixed: Mixed, data: D4MDataModule) -> Tensor:
        """Return what the student is to match: softened outputs, or logits, averaged over the teachers."""

        def outputs(logits: Tensor) -> Tensor:
            return logits if self.loss == "mse" else soften(logits, self.temperature)

        pixels = data.to_unit_range(mixed.images)
        targets = [outputs(teacher(pixels)) for teacher in self._loaded]
        if data.stored_logits is not None:
            targets.append(mixed.values(outputs(data.stored_logits.to(pixels.device))))
        return torch.stack(targets).mean(0)

    def _loss(self, student: Tensor, target: Tensor, mixed: Mixed, labels: Tensor) -> Tensor:
        if self.loss == "mse":
            loss = F.mse_loss(student.float(), target)
        else:
            loss = matching_loss(student, target, self.temperature)
            loss = loss * self.temperature**2 if self.scale_by_temperature else loss
        if self.hard_label_weight:
            shares = mixed.values(F.one_hot(labels, student.shape[1]).float())
            loss = loss + self.hard_label_weight * F.cross_entropy(student.float(), shares)
        return loss

    def _unwrap(self) -> None:
        if self._restore:
            self._restore()
        if self._hook:
            self._hook.remove()
        self._restore, self._hook, self._loaded = None, None, []
