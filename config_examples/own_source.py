"""Your own dataset as a source: a MedMNIST archive (medmnist.com), arrays of grey images and labels in one file."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from d4m_plugin import Source


class Arrays:
    """Images and labels in memory, as a torchvision-style dataset."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.targets = images, labels.ravel().astype(int).tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), self.targets[index]


class MedMNIST(Source):
    """Medical images of 28x28 pixels.

    Args:
        file: such as pneumoniamnist.npz.
        classes: what the labels mean, in their order.
    """

    image_size = 28
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    flip = False  # left and right differ in a body

    def __init__(self, file: Path, classes: list[str]) -> None:
        self.classes: Sequence[str] = classes
        self.file = Path(file)

    @property
    def fingerprint(self) -> str:
        """A hash of the file."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest()

    def train(self) -> Arrays:
        """Return the training images."""
        arrays = np.load(self.file)
        return Arrays(arrays["train_images"], arrays["train_labels"])

    def test(self) -> Arrays:
        """Return the test images."""
        arrays = np.load(self.file)
        return Arrays(arrays["test_images"], arrays["test_labels"])
