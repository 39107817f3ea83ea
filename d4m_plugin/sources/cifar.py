"""CIFAR, through torchvision."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torchvision

from d4m_plugin.cache import make_writable
from d4m_plugin.errors import InputError
from d4m_plugin.sources.base import LabelledImages, Source
from d4m_plugin.units import in_turn


class CIFAR10(Source):
    """CIFAR-10: 50,000 images of 32x32 pixels to train on and 10,000 to test on (A. Krizhevsky, 2009).

    Args:
        root: the folder that torchvision keeps it in.
        download: fetch it where it is not there.

    Raises:
        InputError: where it is not there, when first read.
    """

    dataset = torchvision.datasets.CIFAR10
    image_size = 32
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    diffusion = "cifar10"
    teacher: str | None = "cifar10"
    citation = "A. Krizhevsky: Learning Multiple Layers of Features from Tiny Images, 2009"

    def __init__(self, root: str | Path = "data", download: bool = False) -> None:
        self.root, self.download = Path(root).expanduser(), download

    def _open(self, train: bool) -> torchvision.datasets.CIFAR10:
        name = self.dataset.__name__
        try:
            return self.dataset(self.root, train)
        except RuntimeError as error:
            if not self.download:
                raise InputError(
                    f"`root` is {str(self.root)!r}, which holds no folder {self.dataset.base_folder!r} of {name}; name "
                    "the one that does, or set `download` to true."
                ) from error
        make_writable(self.root, "root")
        try:
            with in_turn(self.root / name, f"downloads {name}"):
                return self.dataset(self.root, train, download=True)
        except (OSError, RuntimeError) as error:
            raise InputError(f"`download` is true, but {self.dataset.url} cannot be fetched: {error}") from error

    @cached_property
    def _train(self) -> torchvision.datasets.CIFAR10:
        return self._open(train=True)

    @cached_property
    def _test(self) -> torchvision.datasets.CIFAR10:
        return self._open(train=False)

    @cached_property
    def classes(self) -> Sequence[str]:  # type: ignore[override]  # read when asked for: the files have the order
        """The class names in the order of the labels, as the dataset's own files have it."""
        return [name.replace("_", " ") for name in self._train.classes]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the training images and labels."""
        return hashlib.sha256(self._train.data.tobytes() + bytes(self._train.targets)).hexdigest()

    def train(self) -> LabelledImages:
        """Return the 50,000 training images."""
        train: LabelledImages = self._train
        return train

    def test(self) -> LabelledImages:
        """Return the 10,000 test images."""
        test: LabelledImages = self._test
        return test

    def stored_bytes(self) -> list[int]:
        """Return each training image's share of the array that they lie in."""
        return [image.nbytes for image in self._train.data]


class CIFAR100(CIFAR10):
    """CIFAR-100: 100 classes of 500 images of 32x32 pixels to train on and 100 to test on (A. Krizhevsky, 2009).

    Args:
        root: the folder that torchvision keeps it in.
        download: fetch it where it is not there.

    Raises:
        InputError: where it is not there, when first read.
    """

    dataset = torchvision.datasets.CIFAR100
    mean = (0.5071, 0.4866, 0.4409)
    std = (0.2673, 0.2564, 0.2762)
    diffusion = Source.diffusion
    teacher = None
