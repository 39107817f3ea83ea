"""Training-Time Matching as functions of tensors (D4M, section 3.3)."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def matching_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return KL(teacher ‖ student) of the softened outputs, averaged over the batch (D4M, equation 8).

    No T² factor and no hard-label term, as in the paper.

    Args:
        student: logits, shape (B, classes).
        teacher: logits, shape (B, classes).
        temperature: T, by which both are divided.
    """
    return F.kl_div(
        F.log_softmax(student.float() / temperature, dim=1),
        F.log_softmax(teacher.float() / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )


class Mixed(NamedTuple):
    """A batch whose images are mixed with another order of themselves."""

    images: Tensor
    permutation: Tensor
    share: float

    def labels(self, labels: Tensor) -> Tensor:
        """Return the label of the larger part of each image."""
        return labels if self.share >= 0.5 else labels[self.permutation]


def cutmix(images: Tensor, alpha: float = 1.0) -> Mixed:
    """Return images of which a box, the same for all, comes from another image of the batch.

    Yun et al., arXiv:1905.04899, Algorithm A1; the box is cut off at the border, so the share is counted again.

    Args:
        images: shape (B, C, H, W).
        alpha: of the Beta distribution that the share of the original is drawn from.
    """
    height, width = images.shape[-2:]
    share = torch.distributions.Beta(alpha, alpha).sample().item()
    edge = (1 - share) ** 0.5
    top, bottom = _box(height, edge)
    left, right = _box(width, edge)
    permutation = torch.randperm(len(images), device=images.device)
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images[permutation, :, top:bottom, left:right]
    return Mixed(mixed, permutation, 1 - (bottom - top) * (right - left) / (height * width))


def _box(length: int, edge: float) -> tuple[int, int]:
    half = int(length * edge) // 2
    centre = int(torch.randint(length, ()))
    return max(centre - half, 0), min(centre + half, length)
