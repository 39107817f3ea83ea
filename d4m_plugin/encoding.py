"""The latents of the real images, class by class (D4M, section 3.2)."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from d4m_plugin.devices import Batches
from d4m_plugin.diffusion import LatentDiffusion
from d4m_plugin.progress import Progress
from d4m_plugin.sources import LabelledImages
from d4m_plugin.sources.images import Resize, squares_of
from d4m_plugin.sources.splits import members_by_label


def encode(
    images: LabelledImages,
    labels: Iterable[int],
    model: LatentDiffusion,
    resolution: int,
    resize: Resize = "crop",
    batch_size: int = 50,
    num_workers: int = 0,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield each label with the latents of all its images, float32, shape (N, C, h, w).

    Args:
        images: the real images; only those of `labels` are read.
        labels: the classes to encode, in this order; each is asked for when its images are about to be read.
        model: whose VAE encodes.
        resolution: edge in pixels that images are resized to (bicubic).
        resize: `crop` or `squash`, for images that are not square.
        batch_size: images a pass.
        num_workers: processes that read images; the same ones for all classes.
        progress: is moved on by one for each image.
    """
    members = members_by_label(images.targets)

    def batches() -> Iterator[tuple[int, bool, list[int]]]:
        for label in labels:
            *others, last = members[label].split(batch_size)
            for part in others:
                yield label, False, part.tolist()
            yield label, True, last.tolist()

    # The loader takes any iterable of what the dataset takes, whatever its type says.
    sampler: Any = batches()
    loader = DataLoader(_Batches(images, resolution, resize), None, sampler=sampler, num_workers=num_workers)
    at_once = Batches(batch_size)
    done, latents = 0, torch.empty(0)
    for label, ends, pixels in loader:
        for part in at_once.run(partial(_encode_part, model, pixels), len(pixels)):
            if not done:
                latents = torch.empty(len(members[label]), *part.shape[1:])  # of all, which a list would hold twice
            latents[done : done + len(part)] = part
            done += len(part)
        if progress is not None:
            progress.update(len(pixels))
        if ends:
            yield label, latents
            done = 0


def _encode_part(model: LatentDiffusion, pixels: Tensor, part: slice) -> Tensor:
    return model.encode(pixels[part])


class _Batches(Dataset[tuple[int, bool, Tensor]]):
    """Some images of a class at a time, uint8, shape (N, 3, size, size), with its label and whether it ends there."""

    def __init__(self, images: LabelledImages, size: int, resize: Resize) -> None:
        self.images, self.size, self.resize = images, size, resize

    def __getitem__(self, batch: tuple[int, bool, list[int]]) -> tuple[int, bool, Tensor]:
        label, ends, indices = batch
        return label, ends, squares_of(self.images, self.size, self.resize, indices)
