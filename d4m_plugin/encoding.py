"""The latents of the real images, class by class (D4M, section 3.2)."""

from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from d4m_plugin.devices import Batches
from d4m_plugin.diffusion import LatentDiffusion
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
    progress: Any = None,
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
        progress: a tqdm bar to move on by one for each image.
    """
    members = members_by_label(images.targets)
    asked_for: deque[tuple[int, bool]] = deque()  # of each batch that is being read: its label, and whether it ends it

    def batches() -> Iterator[list[int]]:
        for label in labels:
            parts = members[label].split(batch_size)
            for number, part in enumerate(parts, 1):
                asked_for.append((label, number == len(parts)))
                yield part.tolist()

    # The loader takes any iterable of what the dataset takes, whatever its type says.
    sampler: Any = batches()
    loader = DataLoader(_Batches(images, resolution, resize), None, sampler=sampler, num_workers=num_workers)
    latents: list[Tensor] = []
    at_once = Batches(batch_size)
    for pixels in loader:
        label, last = asked_for.popleft()
        latents += at_once.run(partial(_encode_part, model, pixels), len(pixels))
        if progress is not None:
            progress.update(len(pixels))
        if last:
            whole, latents = torch.cat(latents), []  # one copy in memory while the caller works
            yield label, whole


def _encode_part(model: LatentDiffusion, pixels: Tensor, part: slice) -> Tensor:
    return model.encode(pixels[part])


class _Batches(Dataset[Tensor]):
    """Some images of a dataset at a time, uint8, shape (N, 3, size, size)."""

    def __init__(self, images: LabelledImages, size: int, resize: Resize) -> None:
        self.images, self.size, self.resize = images, size, resize

    def __getitem__(self, indices: list[int]) -> Tensor:
        return squares_of(self.images, self.size, self.resize, indices)
