"""Training-Time Matching for any LightningModule (D4M, section 3.3)."""

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from d4m_plugin.datamodules import D4MDataModule
from d4m_plugin.errors import InputError
from d4m_plugin.matching import cutmix, matching_loss
from d4m_plugin.teachers import Teacher, check_above_chance, load_teacher


class TeacherMatching(L.Callback):
    """Make a LightningModule learn from a teacher in place of the labels, its code unedited.

    While fitting, each batch is mixed and goes through the module's own `training_step`; the student's logits are
    taken from its forward pass, and the loss that it returns is replaced by the one of matching the teacher, which
    sees the same pixels. The module's own metrics go on: they get integer labels, those of the larger part of each
    mixed image. The teacher is held here alone: no part of it is in the module, its checkpoint or its optimiser.

    Args:
        teacher: `auto` for the source's own; a checkpoint (.ckpt) of a run with `train_on: real`; `torchvision:NAME`
            for a classifier trained on ImageNet; or null to leave the module's own loss and batches alone.
        temperature: T, by which the logits of both are divided, above 0.
        mixing: `cutmix` (the paper's) or `none`.
        student: the submodule that returns the logits, such as `model`; by default the module itself, which then
            has to call `self(images)` in its training step.

    Raises:
        InputError: where an option cannot work, the teacher is unknown, has other classes or is at chance on real
            images, the data is not a D4MDataModule, the module optimises manually, or no logits are seen.
    """

    def __init__(
        self,
        teacher: str | Path | Teacher | None = "auto",
        temperature: float = 20.0,
        mixing: Literal["cutmix", "none"] = "cutmix",
        student: str | None = None,
    ) -> None:
        if mixing not in ("cutmix", "none"):
            raise InputError(f"`mixing` is {mixing!r}; use cutmix or none.")
        if not temperature > 0:
            raise InputError(f"`temperature` is {temperature}; it must be above 0.")
        self.teacher, self.temperature, self.mixing, self.student = teacher, temperature, mixing, student
        self._loaded: Teacher | None = None
        self._restore: Callable[[], None] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Load the teacher and wrap the module's training step."""
        if stage != "fit" or self.teacher is None:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it in fit and declares it nowhere
        if not isinstance(data, D4MDataModule):
            raise InputError(f"TeacherMatching needs a D4MDataModule as `data`; it is {type(data).__name__}.")
        if not pl_module.automatic_optimization:
            raise InputError(
                f"{type(pl_module).__name__} has `automatic_optimization` set to False, so TeacherMatching cannot "
                "replace its loss; use a module that returns its loss from `training_step`."
            )
        if not (is_overridden("setup", pl_module) or is_overridden("configure_model", pl_module)):
            self._check_that_logits_are_seen(pl_module, data)  # all its layers are there by now
        self._loaded = load_teacher(self.teacher, data.source)
        check_above_chance(self._loaded, data.source)
        self._wrap(pl_module, self._loaded, data)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Move the teacher to where the module is."""
        if self._loaded is not None:
            self._loaded.to(pl_module.device)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the module its own training step back."""
        self._unwrap()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the module its own training step back."""
        self._unwrap()

    def _logits_module(self, pl_module: L.LightningModule) -> nn.Module:
        if self.student is None:
            return pl_module
        try:
            return pl_module.get_submodule(self.student)
        except AttributeError as error:
            names = ", ".join(name for name, _ in pl_module.named_children())
            raise InputError(
                f"`student` is {self.student!r}, which {type(pl_module).__name__} does not have; it has {names}."
            ) from error

    def _check_that_logits_are_seen(self, pl_module: L.LightningModule, data: D4MDataModule) -> None:
        """Run the step of a copy on two black images, so that a wrong `student` is known before any long work."""
        batch = torch.zeros(2, 3, data.image_size, data.image_size), torch.zeros(2, dtype=torch.int64)
        self._logits_module(pl_module)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
                copied = copy.deepcopy(pl_module).cpu()
                takes_index = is_param_in_hook_signature(copied.training_step, "batch_idx", min_args=2)
                arguments = (batch, 0) if takes_index else (batch,)
                with _logits_of(self._logits_module(copied), (2, data.num_classes)) as seen:
                    copied.training_step(*arguments)
        except Exception:
            return  # a module that needs its trainer to make a step: if its step is wrong, training says so
        if not seen:
            raise self._nothing_seen(pl_module, (2, data.num_classes))

    def _nothing_seen(self, pl_module: L.LightningModule, shape: tuple[int, int]) -> InputError:
        where = "the module itself" if self.student is None else repr(self.student)
        return InputError(
            f"TeacherMatching saw no logits of shape {shape} from {where} in the training step of "
            f"{type(pl_module).__name__}; set `student` (`--matching.student`) to the submodule that returns them."
        )

    def _wrap(self, pl_module: L.LightningModule, teacher: Teacher, data: D4MDataModule) -> None:
        own_step = pl_module.training_step

        @functools.wraps(own_step)
        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            images, labels = _images_and_labels(batch)
            if self.mixing == "cutmix":
                mixed = cutmix(images)
                images, labels = mixed.images, mixed.labels(labels)
            shape = (len(images), data.num_classes)
            with _logits_of(self._logits_module(pl_module), shape) as seen:
                result = own_step((images, labels), *args, **kwargs)
            if not seen:
                raise self._nothing_seen(pl_module, shape)
            loss = matching_loss(seen[-1], teacher(data.to_unit_range(images)), self.temperature)
            pl_module.log("matching_loss", loss.detach(), prog_bar=True)
            return {**result, "loss": loss} if isinstance(result, dict) else loss

        own_attribute = vars(pl_module).get("training_step")
        pl_module.training_step = training_step  # type: ignore[method-assign]  # on the instance: its class stays as it is

        def restore() -> None:
            del pl_module.training_step
            if own_attribute is not None:
                pl_module.training_step = own_attribute  # type: ignore[method-assign]

        self._restore = restore

    def _unwrap(self) -> None:
        if self._restore is not None:
            self._restore()
        self._restore = self._loaded = None


@contextmanager
def _logits_of(module: nn.Module, shape: tuple[int, int]) -> Iterator[list[Tensor]]:
    """Collect what a module returns of a shape: under DDP its outer call, which returns the loss, is seen too."""
    seen: list[Tensor] = []

    def see(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.shape == shape:
            seen.append(output)

    hook = module.register_forward_hook(see)
    try:
        yield seen
    finally:
        hook.remove()


def _images_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return batch[0], batch[1]
    raise InputError(f"TeacherMatching takes batches of (images, labels); this one is a {type(batch).__name__}.")
