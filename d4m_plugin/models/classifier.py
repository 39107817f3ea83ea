"""The default student as a LightningModule."""

import math
from collections.abc import Iterable

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from d4m_plugin.checking import check_above_zero, check_least
from d4m_plugin.errors import InputError
from d4m_plugin.models.students import create_student


class ImageClassifier(L.LightningModule):
    """An image classifier trained under the paper's settings: AdamW and a cosine schedule to zero.

    Args:
        num_classes: size of the output; linked to the data's on the command line.
        image_size: edge in pixels of the input; linked to the data's on the command line.
        student: `convnet` (depth 3, width 128, the field's standard), or a torchvision classifier such as `resnet18`.
        lr: the first learning rate.
        lr_smoothing: ζ, by which the cosine schedule is stretched so that it ends above zero (RD3, arXiv:2509.19743):
            at step s of S the rate is lr (1 + cos(π s / ζS)) / 2; at least 1, which is the paper's schedule.
        weight_decay: of all parameters but one-dimensional ones (biases and norms), as in the authors' code.
        compile: compile the student with `torch.compile`: some seconds first, then the convnet's step takes half the
            time on a CPU, which needs a C++ compiler.

    Raises:
        InputError: where there is no such student.
    """

    def __init__(
        self,
        num_classes: int,
        image_size: int = 32,
        student: str = "convnet",
        lr: float = 1e-3,
        lr_smoothing: float = 1.0,
        weight_decay: float = 0.01,
        compile: bool = False,
    ) -> None:
        super().__init__()
        check_above_zero(lr=lr)
        check_least(1, lr_smoothing=lr_smoothing)
        self.save_hyperparameters()
        self.lr, self.lr_smoothing, self.weight_decay = lr, lr_smoothing, weight_decay
        self.student = create_student(student, num_classes, image_size)
        if compile:
            self.student.compile()  # in place: the names of the weights stay
        # Its checks wait for the device at every step; labels have been checked.
        accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.train_accuracy, self.val_accuracy, self.test_accuracy = (accuracy.clone() for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape (B, num_classes), of normalised images, float32, shape (B, 3, H, W)."""
        logits: Tensor = self.student(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy with the labels; TeacherMatching puts its own loss in place of it."""
        images, labels = batch
        logits = self(images)
        self.train_accuracy(logits, labels)
        self.log("train_accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return F.cross_entropy(logits, labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy on a batch of real images."""
        images, labels = batch
        self.val_accuracy(self(images), labels)
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy on a batch of real images."""
        images, labels = batch
        self.test_accuracy(self(images), labels)
        self.log("test_accuracy", self.test_accuracy)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the most likely label of each image, int64, shape (B,)."""
        logits: Tensor = self(batch[0])
        return logits.argmax(1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, and a cosine schedule over all steps of the run, of which a longer one that resumes has more."""
        optimizer = torch.optim.AdamW(decay_groups(self.parameters(), self.weight_decay), lr=self.lr)
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise InputError("`max_steps` is -1 and `max_epochs` too, but a cosine schedule needs an end; set one.")
        end = max(1, self.lr_smoothing * steps)

        def share(step: int) -> float:
            first: float = optimizer.param_groups[0]["initial_lr"]  # the schedule's; a LearningRateFinder sets another
            return self.lr / first * (1 + math.cos(math.pi * step / end)) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)  # CosineAnnealingLR would end as its checkpoint
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
    """Return optimiser groups in which parameters of one dimension do not decay."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
