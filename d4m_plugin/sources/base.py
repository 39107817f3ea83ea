"""What every real dataset offers, whatever it is made from."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol, Self

import numpy as np
from PIL import Image

from d4m_plugin.errors import InputError
from d4m_plugin.sources.splits import carve


class LabelledImages(Protocol):
    """A torchvision-style dataset of images with integer labels, whose labels are known without decoding."""

    @property
    def targets(self) -> Sequence[int] | np.ndarray:
        """The label of each image, in order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


class Source(ABC):
    """A real, labelled image dataset to distil: subclass it to bring your own.

    Attributes:
        classes: the name of each class in the order of the labels; what the prompts say.
        image_size: edge in pixels of the square images that students see.
        mean, std: what students' input, in [0, 1], is normalised by, by channel; ImageNet's by default.
        flip: whether a mirrored image is still one of its class.
        diffusion: the latent diffusion model that suits the images.
        license: of the images, by the Hub's name for it.
        teacher: the teacher that `auto` stands for, where there is one.
        citation: who made the images, and where that is told.
        hub_id: the Hub's name for the dataset, where it is from there.
        arguments: what the constructor was told: how a card says to make the set again.
    """

    classes: Sequence[str]
    image_size: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # ImageNet's
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    flip: bool = True
    diffusion: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    license: str = "unknown"
    teacher: str | None = None
    citation: str = ""
    hub_id: str | None = None
    arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Note the arguments, and leave the rest to the constructor."""
        source = super().__new__(cls)
        # Partial, since unpickling gives none: it brings them with the other attributes.
        told = inspect.signature(cls.__init__).bind_partial(source, *args, **kwargs).arguments
        source.arguments = dict(list(told.items())[1:])  # all but the object itself
        return source

    @property
    def name(self) -> str:
        """A short name for folders and cards."""
        return type(self).__name__.lower()

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the training images and labels: equal for equal data, another for other data."""

    @abstractmethod
    def train(self) -> LabelledImages:
        """Return the training split: RGB images and labels in [0, len(classes))."""

    @abstractmethod
    def test(self) -> LabelledImages:
        """Return the split that accuracies are measured on."""

    def stored_bytes(self) -> Sequence[int] | np.ndarray:
        """Return how many bytes each training image takes where it is stored, encoded as it is there, in order.

        A source need not tell: only the arm `equal_bytes` of an evaluation asks.

        Raises:
            InputError: where it does not.
        """
        raise InputError(
            f"`arms` has 'equal_bytes', but {self.name} does not tell how many bytes its images take; leave it out, or "
            f"give {type(self).__name__} a method `stored_bytes`."
        )


class IndexedImages(LabelledImages, Protocol):
    """Images that are read one by one when asked for."""

    @property
    def keys(self) -> Sequence[bytes]:
        """What each is called, whatever the others."""

    @property
    def fingerprint(self) -> str:
        """A hash of their labels and of what tells the images apart."""

    def stored_bytes(self) -> Sequence[int] | np.ndarray:
        """Return how many bytes each takes where it is stored."""

    def only(self, chosen: Sequence[int]) -> Self:
        """Return some of them."""


class IndexedSource(Source):
    """A source whose splits are indexed at construction, as `_train` and `_test`."""

    _train: IndexedImages
    _test: IndexedImages

    def _set_apart(self, share: float, seed: int) -> None:
        """Take the test images from the training images."""
        kept, apart = carve(self._train.targets, self._train.keys, share, seed)
        self._train, self._test = self._train.only(kept), self._train.only(apart)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the training labels, and of the images' names, sizes or last bytes: not all is read."""
        return self._train.fingerprint

    def train(self) -> IndexedImages:
        """Return the training images."""
        return self._train

    def test(self) -> IndexedImages:
        """Return the images that accuracies are measured on."""
        return self._test

    def stored_bytes(self) -> Sequence[int] | np.ndarray:
        """Return how many bytes each training image takes in its file, encoded as it is there."""
        return self._train.stored_bytes()
