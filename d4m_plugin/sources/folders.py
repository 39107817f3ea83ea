"""Images in folders by class, through torchvision."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torchvision
from PIL import Image

from d4m_plugin.errors import InputError
from d4m_plugin.sources.base import LabelledImages, Source

TEST_FOLDERS = ("val", "validation", "test")


class ImageFolder(Source):
    """Images under `root/train/CLASS/` and `root/val/CLASS/` (or `validation`, `test`).

    Args:
        root: the folder.
        image_size: edge in pixels of the images that students see.
    """

    def __init__(self, root: str | Path, image_size: int = 224) -> None:
        self.root, self.image_size = Path(root), image_size
        tests = [name for name in TEST_FOLDERS if (self.root / name).is_dir()]
        if not (self.root / "train").is_dir() or not tests:
            raise InputError(f"`root` is {str(self.root)!r}, which needs the folders train and one of val, test.")
        self._test_folder = self.root / tests[0]
        self.classes = self._names()

    @cached_property
    def _train(self) -> torchvision.datasets.ImageFolder:
        return self._open(self.root / "train")

    def _names(self) -> Sequence[str]:
        folders = sorted(path.name for path in (self.root / "train").iterdir() if path.is_dir())
        return [folder.replace("_", " ") for folder in folders]

    def _open(self, folder: Path) -> torchvision.datasets.ImageFolder:
        try:
            return torchvision.datasets.ImageFolder(folder, loader=_load)
        except FileNotFoundError as error:
            raise InputError(f"`root` is {str(self.root)!r}: {error}") from error

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the training images' paths and sizes: reading every file would take too long."""
        digest = hashlib.sha256()
        for path, _ in self._train.samples:
            digest.update(f"{Path(path).relative_to(self.root)}\0{Path(path).stat().st_size}\0".encode())
        return digest.hexdigest()

    def train(self) -> LabelledImages:
        """Return the images under train."""
        train: LabelledImages = self._train
        return train

    def test(self) -> LabelledImages:
        """Return the images under val, validation or test."""
        images = self._open(self._test_folder)
        if images.classes != self._train.classes:  # labels are the folders' numbers
            unlike = sorted(set(images.classes) ^ set(self._train.classes))
            raise InputError(
                f"`root` is {str(self.root)!r}, whose train and {self._test_folder.name} differ in the class folders "
                f"{', '.join(unlike[:3])}; they need the same ones."
            )
        test: LabelledImages = images
        return test


def _load(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:  # Pillow's for files that are cut off or no images
        raise InputError(f"{path!r} cannot be read as an image ({error}); mend or remove it.") from error


class ImageNet(ImageFolder):
    """ImageNet-1K: `root/train` and `root/val`, with a folder for each of the 1,000 WordNet ids.

    The class names are torchvision's: 134 is the crane that flies, "crane bird", and 517 the one that lifts.

    Args:
        root: the folder.
        image_size: edge in pixels of the images that students see.
    """

    def _names(self) -> Sequence[str]:
        names: Sequence[str] = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
        folders = len(super()._names())
        if folders != len(names):
            raise InputError(f"`root` is {str(self.root)!r}, whose train has {folders} folders, not ImageNet's 1,000.")
        return names
