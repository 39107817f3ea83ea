"""Training-Time Matching as functions of tensors (D4M, section 3.3)."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def soften(logits: Tensor, temperature: float) -> Tensor:
    """Return the softened outputs of a teacher, float32, shape (B, classes).

    Args:
        logits: the teacher's, shape (B, classes).
        temperature: T, by which they are divided.
    """
    return (logits.float() / temperature).softmax(1)


def matching_loss(student: Tensor, softened: Tensor, temperature: float) -> Tensor:
    """Return KL(teacher ‖ student) of the softened outputs, averaged over the batch (D4M, equation 8).

    No T² factor and no hard-label term, as in the paper.

    Args:
        student: logits, shape (B, classes).
        softened: the teacher's probabilities at the temperature, float32, shape (B, classes).
        temperature: T, by which the student's logits are divided.
    """
    return F.kl_div(F.log_softmax(student.float() / temperature, dim=1), softened, reduction="batchmean")


class Mixed(NamedTuple):
    """A batch whose images are mixed with another order of themselves."""

    images: Tensor
    permutation: Tensor
    share: float

    def labels(self, labels: Tensor) -> Tensor:
        """Return the label of the larger part of each image."""
        return labels if self.share >= 0.5 else labels[self.permutation]

    def values(self, values: Tensor) -> Tensor:
        """Return what each image's parts are labelled with, float, shape (B, …), averaged by their shares."""
        return self.share * values + (1 - self.share) * values[self.permutation]


def unmixed(images: Tensor) -> Mixed:
    """Return a batch as it is."""
    return Mixed(images, torch.arange(len(images), device=images.device), 1.0)


def cutmix(images: Tensor) -> Mixed:
    """Return images of which a box, the same for all, comes from another image of the batch.

    Yun et al., arXiv:1905.04899, Algorithm A1; the box is cut off at the border, so the share is counted again.

    Args:
        images: shape (B, C, H, W).
    """
    height, width = images.shape[-2:]
    share = _share()
    edge = (1 - share) ** 0.5
    top, bottom = _box(height, edge)
    left, right = _box(width, edge)
    permutation = torch.randperm(len(images), device=images.device)
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images[permutation, :, top:bottom, left:right]
    return Mixed(mixed, permutation, 1 - (bottom - top) * (right - left) / (height * width))


def mixup(images: Tensor) -> Mixed:
    """Return images each averaged with another of the batch, all by the same share (Zhang et al., arXiv:1710.09412).

    Args:
        images: float, shape (B, C, H, W).
    """
    share = _share()
    permutation = torch.randperm(len(images), device=images.device)
    return Mixed(share * images + (1 - share) * images[permutation], permutation, share)


MIXINGS = {"cutmix": cutmix, "mixup": mixup, "none": unmixed}


def _share() -> float:
    """Draw the share of the original from Beta(1, 1), which is uniform."""
    return torch.rand((), dtype=torch.float32).item()  # whatever dtype the trainer makes the default


def _box(length: int, edge: float) -> tuple[int, int]:
    half = int(length * edge) // 2
    centre = int(torch.randint(length, ()))
    return max(centre - half, 0), min(centre + half, length)
