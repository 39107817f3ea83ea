"""Subsets of the real images: the baselines that a distilled set has to beat."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from d4m_plugin.errors import InputError
from d4m_plugin.seeding import generator_of
from d4m_plugin.sources import LabelledImages, Source
from d4m_plugin.sources.splits import counts_by_label, members_by_label


def random_subset(source: Source, ipc: int, seed: int) -> LabelledImages:
    """Return `ipc` real training images of each class, drawn without replacement.

    Args:
        source: the real images.
        ipc: images per class.
        seed: decides the draw: another seed, a fresh draw.

    Raises:
        InputError: where a class has fewer images.
    """
    train = source.train()
    for name, count in zip(source.classes, counts_by_label(train.targets, len(source.classes)), strict=True):
        if count < ipc:
            raise InputError(f"`ipc` is {ipc}, but class {name!r} has {count} images; lower it.")
    return at_most(train, ipc, seed)


def at_most(images: LabelledImages, per_class: int | Sequence[int], seed: int) -> "Chosen":
    """Return images of which each class has no more than `per_class`, class by class, drawn by `seed`.

    Args:
        images: from which is drawn.
        per_class: how many of each class, or of each label.
        seed: decides the draw: another seed, a fresh draw.
    """
    chosen = []
    for label, members in members_by_label(images.targets).items():
        order = torch.randperm(len(members), generator=generator_of(seed, label))
        chosen.append(members[order[: per_class if isinstance(per_class, int) else per_class[label]]])
    return Chosen(images, torch.cat(chosen))


class Chosen:
    """Some of a dataset's images."""

    def __init__(self, images: LabelledImages, indices: Tensor) -> None:
        self.images, self.indices = images, indices.numpy()
        self.targets = np.asarray(images.targets)[self.indices]

    @property
    def fingerprint(self) -> str:
        """A hash of which they are, and of what those of all are known by, where they are known."""
        of_all = getattr(self.images, "fingerprint", "")
        return hashlib.sha256(of_all.encode() + self.indices.astype(np.int64).tobytes()).hexdigest()

    @property
    def keys(self) -> list[bytes]:
        """What each is known by; an AttributeError where the images have no such names."""
        keys: list[bytes] = self.images.keys  # type: ignore[attr-defined]  # of images in files
        return [keys[index] for index in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[int(self.indices[index])]
