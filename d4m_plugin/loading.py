"""Batches of images: of squares that are held in memory, or of files that are read anew."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset, default_collate

from d4m_plugin.sources import LabelledImages
from d4m_plugin.sources.images import Resize, squares_of, to_pixels

HELD_BYTES = 2**31  # of training or test images; more are read anew for each batch


class Transformed(Dataset[tuple[Tensor, int]]):
    """A dataset seen through a transform of its images."""

    def __init__(self, images: LabelledImages, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        return self.transform(image), int(label)


class Held(TensorDataset):
    """Tensors in memory, images uint8 (N, 3, H, W) first, of which a loader takes a batch by one indexing."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        batch: tuple[Tensor, ...] = self[indices]
        return batch


def hold(images: LabelledImages, size: int, resize: Resize, num_workers: int) -> Held:
    """Return images held as squares, read by `num_workers` processes."""
    pixels = squares_of(images, size, resize, num_workers=num_workers)
    return Held(pixels, torch.as_tensor(images.targets, dtype=torch.int64))


def hold_squares(images: LabelledImages, size: int) -> Held | None:
    """Return images that are squares of a size already, held; None where they are too many, or some are others."""
    if 3 * size**2 * len(images) > HELD_BYTES:
        return None
    pixels = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
    for index in range(len(images)):
        image, _ = images[index]
        if image.size != (size, size):
            return None
        pixels[index] = to_pixels(image, size)
    return Held(pixels, torch.as_tensor(images.targets, dtype=torch.int64))


def loader_of(
    dataset: Held | Transformed,
    sampler: Sampler[int],
    batch_size: int,
    num_workers: int,
    drop_last: bool = False,
) -> DataLoader[Any]:
    """Return a loader of batches; workers only read files, and stay from epoch to epoch."""
    workers = 0 if isinstance(dataset, Held) else num_workers  # a held batch is one indexing
    return DataLoader(
        dataset,
        batch_size=batch_size,  # by name: Lightning makes predict's loader anew from the arguments
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=_as_it_is if isinstance(dataset, Held) else default_collate,
        drop_last=drop_last,
    )


def _as_it_is(batch: Any) -> Any:
    return batch
