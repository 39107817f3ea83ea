"""Subsets of the real images: the baselines that a distilled set has to beat."""

import torch
from PIL import Image

from d4m_plugin.errors import InputError
from d4m_plugin.seeding import generator_of
from d4m_plugin.sources import LabelledImages, Source


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
    targets = torch.tensor(train.targets)
    chosen: list[int] = []
    for label, name in enumerate(source.classes):
        members = (targets == label).nonzero().flatten()
        if len(members) < ipc:
            raise InputError(f"`ipc` is {ipc}, but class {name!r} has {len(members)} images; lower it.")
        order = torch.randperm(len(members), generator=generator_of(seed, label))
        chosen += members[order[:ipc]].tolist()
    return _Chosen(train, chosen)


class _Chosen:
    """Some of a dataset's images."""

    def __init__(self, images: LabelledImages, indices: list[int]) -> None:
        self.images, self.indices = images, indices
        self.targets = [images.targets[index] for index in indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[self.indices[index]]
