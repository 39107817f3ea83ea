"""The latents of the real images, class by class, kept for further sets where asked (D4M, section 3.2)."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from d4m_plugin.cache import written_whole
from d4m_plugin.devices import Batches
from d4m_plugin.diffusion import LatentDiffusion
from d4m_plugin.sources import LabelledImages
from d4m_plugin.sources.images import Resize, to_pixels
from d4m_plugin.sources.splits import members_by_label


def encode(
    images: LabelledImages,
    labels: Sequence[int],
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
        labels: the classes to encode, in this order.
        model: whose VAE encodes.
        resolution: edge in pixels that images are resized to (bicubic).
        resize: `crop` or `squash`, for images that are not square.
        batch_size: images a pass.
        num_workers: processes that read images; the same ones for all classes.
        progress: a tqdm bar to move on by one for each image.
    """
    members = members_by_label(images.targets)
    batches = [(label, batch.numpy()) for label in labels for batch in members[label].split(batch_size)]
    sampler = [batch for _, batch in batches]
    loader = DataLoader(_Pixels(images, resolution, resize), batch_sampler=sampler, num_workers=num_workers)
    latents: list[Tensor] = []
    at_once = Batches(batch_size)
    for position, (pixels, (label, _)) in enumerate(zip(loader, batches, strict=True)):
        latents += at_once.run(partial(_encode_part, model, pixels), len(pixels))
        if progress is not None:
            progress.update(len(pixels))
        if position + 1 == len(batches) or batches[position + 1][0] != label:
            whole, latents = torch.cat(latents), []  # one copy in memory while the caller works
            yield label, whole


def _encode_part(model: LatentDiffusion, pixels: Tensor, part: slice) -> Tensor:
    return model.encode(pixels[part])


def read_or_encode(
    labels: Sequence[int],
    folder: Path,
    keep: bool,
    encode: Callable[[Sequence[int]], Iterator[tuple[int, Tensor]]],
    progress: Any,
) -> Iterator[tuple[int, Tensor]]:
    """Yield each label with its latents: read from a folder where an earlier run kept them, else encoded.

    Args:
        labels: the classes, in this order.
        folder: where the latents of each class lie, or will.
        keep: write what is encoded there.
        encode: gives the latents of some of the classes.
        progress: a tqdm bar to move on by what is read; `encode` moves it by what it encodes.
    """
    files = {label: folder / f"class-{label:06d}.safetensors" for label in labels}
    missing = {label for label in labels if not files[label].exists()}  # asked once: another run may write there
    encoded = encode([label for label in labels if label in missing])
    if keep:
        folder.mkdir(parents=True, exist_ok=True)
    for label, file in files.items():
        if label in missing:
            _, latents = next(encoded)
            if keep:
                with written_whole(file) as path:
                    save_file({"latents": latents}, path)
        else:
            latents = load_file(file)["latents"]
            progress.update(len(latents))
        yield label, latents


class _Pixels(Dataset[Tensor]):
    """The images of a dataset alone, uint8, shape (3, size, size)."""

    def __init__(self, images: LabelledImages, size: int, resize: Resize) -> None:
        self.images, self.size, self.resize = images, size, resize

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return to_pixels(self.images[int(index)][0], self.size, self.resize)
