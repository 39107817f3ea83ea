"""The set that is judged: one of ours, or images that any other method distilled."""

import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from d4m_plugin.distilled import DistilledDataset
from d4m_plugin.errors import InputError, InputWarning
from d4m_plugin.hub import is_hub_id
from d4m_plugin.recipe import Recipe
from d4m_plugin.sharing import OthersSet, find_set, labels_of
from d4m_plugin.sources import LabelledImages, Source
from d4m_plugin.sources.folders import class_folders, index
from d4m_plugin.sources.images import Resize, squares_of
from d4m_plugin.sources.names import readable
from d4m_plugin.sources.splits import counts_by_label

LONGEST_NAME = 100  # of a set: file systems take 255 bytes


class Squares:
    """Images in memory as a dataset.

    Args:
        pixels: uint8, shape (N, 3, H, H).
        targets: the label of each.
    """

    def __init__(self, pixels: Tensor, targets: Sequence[int] | np.ndarray) -> None:
        self.pixels, self.targets = pixels, [int(label) for label in targets]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return to_pil_image(self.pixels[index]), self.targets[index]


@dataclass(frozen=True)
class JudgedSet:
    """A distilled set.

    Attributes:
        name: what the report calls it.
        squares: its images and labels, those of the source's classes.
        counts: images of each class.
        resize: how real images that are not square become so.
        fingerprint: a hash of the images and labels.
        dataset: itself, where it is one of ours.
        caution: what to know before a verdict on it; mostly nothing.
        stored: the bytes of its images on disk, where they are another's files.
    """

    name: str
    squares: Squares
    counts: list[int]
    resize: Resize
    fingerprint: str
    dataset: DistilledDataset | None = None
    caution: str = ""
    stored: int | None = None

    @property
    def image_size(self) -> int:
        """Edge in pixels of what students see."""
        return self.squares.pixels.shape[-1]

    @property
    def ipc(self) -> int:
        """Images per class, of the fullest where they differ."""
        return max(self.counts)


def open_set(name: str, source: Source, config_name: str | None = None) -> JudgedSet:
    """Return a distilled set of a source.

    Args:
        name: a folder of ours, or that of one of several sets in it; a dataset repository of the Hub, as user/name,
            ours or another's; a folder that has one of images for each class; or a .pt file of a dict of `images`,
            uint8 or float in [0, 1], shape (N, 3, H, W), and `labels`, int64, shape (N,), or of the two as a pair.
        source: the real images that it was distilled from.
        config_name: which of several sets.

    Raises:
        InputError: where there is no such set, or its classes are not the source's.
    """
    path = Path(name).expanduser()
    if not path.exists() and not is_hub_id(name):
        raise InputError(f"`distilled_set` is {name!r}: no folder or file here, and no name of the Hub's (user/name).")
    if not path.exists():
        try:
            found = find_set(source, Recipe(), name, config_name)
        except InputError as error:
            raise InputError(f"`distilled_set` is {name!r}, no folder here; as a name of the Hub's: {error}") from error
        if isinstance(found, DistilledDataset):
            return ours(found, source)
        assert found is not None  # as it is of a recipe that is all defaults
        return _others(name.replace("/", "-"), found, source)
    if not path.is_dir():
        return _of_a_file(path, source)
    if (path / "d4m.json").is_file() or any(path.glob("*/d4m.json")):
        return ours(DistilledDataset(path.resolve(), config_name), source)
    try:
        folders = class_folders(path)
    except InputError as error:
        raise InputError(
            f"`distilled_set` is {name!r}: no set of ours lies there, and no folders of images."
        ) from error
    files = index(path, folders)
    label_of = labels_of([readable(folder) for folder in folders], source, str(path))
    return _others(path.resolve().name, OthersSet(files, label_of), source)


def ours(dataset: DistilledDataset, source: Source) -> JudgedSet:
    """Return a set of ours.

    Raises:
        InputError: where its classes are not the source's.
    """
    if dataset.classes != list(source.classes):
        raise InputError(f"`source` is {source.name}, whose classes are not those of the distilled set.")
    caution = dataset.caution_of(source)
    if caution:
        warnings.warn(caution, InputWarning, stacklevel=2)
    name = f"{dataset.metadata['source']['name']}-{dataset.folder.name}"
    squares = Squares(dataset.images, dataset.targets)
    return _judged(name, squares, source, dataset.recipe["resize"], dataset, caution)


def _of_a_file(path: Path, source: Source) -> JudgedSet:
    try:
        held: Any = torch.load(path, map_location="cpu", weights_only=True)
        images, labels = (held["images"], held["labels"]) if isinstance(held, dict) else held
        images, labels = torch.as_tensor(images, device="cpu"), torch.as_tensor(labels, device="cpu").long().flatten()
        images.untyped_storage()  # which a sparse tensor has not
    except Exception as error:  # torch and pickle raise all kinds for a file that is something else
        raise InputError(
            f"`distilled_set` is {str(path)!r}, which does not hold tensors of `images` and `labels`."
        ) from error
    told = f"`distilled_set` is {str(path)!r}"
    if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(labels) or not images.numel():
        raise InputError(f"{told}, whose images are of shape {tuple(images.shape)}, for {len(labels)} labels.")
    if images.untyped_storage().nbytes() < images.nbytes:  # repeated in the file's description alone
        raise InputError(f"{told}, which does not hold all of its images.")
    if images.is_floating_point():
        if not (images.min() >= 0 and images.max() <= 1):
            raise InputError(f"{told}, whose images leave [0, 1]; undo the normalisation.")
        images = (images * 255).round()
    elif images.dtype != torch.uint8:
        raise InputError(f"{told}, whose images are {images.dtype}; they must be uint8, or floats in [0, 1].")
    if labels.min() < 0 or labels.max() >= len(source.classes):
        raise InputError(f"{told}, whose labels leave [0, {len(source.classes)}).")
    return _others(path.stem, Squares(images.to(torch.uint8), labels.tolist()), source)


def _others(name: str, images: LabelledImages, source: Source) -> JudgedSet:
    squares = Squares(squares_of(images, source.image_size), images.targets)
    stored = sum(images.images.stored_bytes()) if isinstance(images, OthersSet) else None
    return _judged(name, squares, source, "crop", stored=stored)


def _judged(
    name: str,
    squares: Squares,
    source: Source,
    resize: Resize,
    dataset: DistilledDataset | None = None,
    caution: str = "",
    stored: int | None = None,
) -> JudgedSet:
    if len(squares) < 2:
        raise InputError(f"`distilled_set` is {name!r}, which has one image; a set of a source has two at the least.")
    digest = hashlib.sha256(str(squares.targets).encode())
    digest.update(squares.pixels.contiguous().numpy().data)
    name = re.sub(r"[^\w.-]+", "-", name).strip(".-") or "set"  # a stranger's, which will be a folder's
    return JudgedSet(
        name=name[:LONGEST_NAME],
        squares=squares,
        counts=counts_by_label(squares.targets, len(source.classes)),
        resize=resize,
        fingerprint=digest.hexdigest()[:12],
        dataset=dataset,
        caution=caution,
        stored=stored,
    )
