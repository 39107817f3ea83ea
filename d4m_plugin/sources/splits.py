"""The images of each class, and setting test images apart where a dataset has none."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from d4m_plugin.errors import InputError


def members_by_label(targets: Sequence[int] | np.ndarray) -> dict[int, Tensor]:
    """Return the indices, in order, of the images of each label that occurs, int64, in one sort of all."""
    labels = torch.as_tensor(targets, dtype=torch.int64)
    counts = labels.bincount()
    members = labels.argsort(stable=True).split(counts.tolist())
    return {label: indices for label, indices in enumerate(members) if len(indices)}


def counts_by_label(targets: Sequence[int] | np.ndarray, classes: int) -> list[int]:
    """Return how many images each of so many classes has, by its label."""
    counts: list[int] = torch.as_tensor(targets, dtype=torch.int64).bincount(minlength=classes).tolist()
    return counts


def check_share(test_share: float) -> None:
    """Refuse what is no share of the images to set apart.

    Raises:
        InputError: where it is none.
    """
    if not 0 < test_share < 1:
        raise InputError(f"`test_share` is {test_share}; it must be above 0 and below 1.")


def carve(
    targets: Sequence[int] | np.ndarray, keys: Sequence[bytes], share: float, seed: int
) -> tuple[list[int], list[int]]:
    """Return the indices of images to keep and of those set apart, each in order.

    Of each class `share` is set apart, rounded, but at least one image where it has two or more, and never all: those
    whose keys' hashes are the least, so that hardly an image changes sides where others come or go.

    Args:
        targets: the label of each image.
        keys: what each is called.
        share: in (0, 1).
        seed: decides which.

    Raises:
        InputError: where `share` is not a share, or no class has two images.
    """
    check_share(share)
    apart = torch.zeros(len(targets), dtype=torch.bool)
    for members in members_by_label(targets).values():
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        apart[sorted(members.tolist(), key=lambda index: _rank(seed, keys[index]))[:count]] = True
    if not apart.any():
        raise InputError("no class has a second image to test on; add images, or name a test split.")
    return (~apart).nonzero().flatten().tolist(), apart.nonzero().flatten().tolist()


def _rank(seed: int, key: bytes) -> bytes:
    return hashlib.sha256(b"%d %s" % (seed, key)).digest()
