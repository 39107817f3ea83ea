"""Subsets of the real images: the baselines that a distilled set has to beat."""

import torch
from torch.utils.data import Subset

from d4m_plugin.errors import InputError
from d4m_plugin.seeding import generator_of
from d4m_plugin.sources import Source


def random_subset(source: Source, ipc: int, seed: int) -> Subset[tuple[object, int]]:
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
    return Subset(train, chosen)  # type: ignore[arg-type]  # a torchvision-style dataset need not be a torch Dataset
