"""scikit-learn's handwritten digits: the default source, since it needs no download."""

import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from PIL import Image

from d4m_plugin.sources.base import LabelledImages, Source

TEST_IMAGES = 500


class _ArrayImages:
    """Grey images held as one array, given out as RGB at `image_size`."""

    def __init__(self, images: np.ndarray, targets: np.ndarray, image_size: int) -> None:
        self.images, self.targets, self.image_size = images, targets.tolist(), image_size

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image = Image.fromarray(self.images[index])
        size = (self.image_size, self.image_size)
        return image.resize(size, Image.Resampling.BICUBIC).convert("RGB"), self.targets[index]


class Digits(Source):
    """The 1,797 handwritten digits of scikit-learn: 1,297 to train on and 500 to test on.

    They are 8x8 pixels with 17 grey levels, shown at 32x32 (bicubic). The split is stratified and fixed.
    Origin: E. Alpaydin and C. Kaynak, UCI, 1998 (CC BY 4.0); scikit-learn has the test part of it.
    """

    classes: Sequence[str] = tuple("0123456789")
    image_size = 32
    flip = False
    license = "cc-by-4.0"
    citation = "E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI, 1998"
    diffusion = "digits"
    teacher = "digits"

    @cached_property
    def _splits(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)
        train, test, train_targets, test_targets = train_test_split(
            images, digits.target, test_size=TEST_IMAGES, stratify=digits.target, random_state=0
        )
        return train, train_targets, test, test_targets

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the training images and labels."""
        images, targets, *_ = self._splits
        return hashlib.sha256(images.tobytes() + targets.astype(np.int64).tobytes()).hexdigest()

    def train(self) -> LabelledImages:
        """Return the 1,297 training digits."""
        images, targets, *_ = self._splits
        return _ArrayImages(images, targets, self.image_size)

    def test(self) -> LabelledImages:
        """Return the 500 test digits."""
        *_, images, targets = self._splits
        return _ArrayImages(images, targets, self.image_size)

    def stored_bytes(self) -> list[int]:
        """Return each training digit's share of the array: a byte a pixel."""
        images, *_ = self._splits
        return [image.nbytes for image in images]
