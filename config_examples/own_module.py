"""A LightningModule as anyone might have written it: it knows nothing of distillation or teachers."""

import lightning as L
import torch
from torch import Tensor, nn


class PlainClassifier(L.LightningModule):
    """Two convolutions and a hidden layer, trained by cross entropy."""

    def __init__(self, num_classes: int, hidden: int = 128) -> None:
        """Takes `num_classes`, which our command line fills in from the data."""
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 8 * 8, hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        return self.network(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        images, labels = batch
        self.log("val_acc", (self(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        images, labels = batch
        self.log("test_acc", (self(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)
