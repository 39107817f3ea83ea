"""From an image file of any kind to the RGB picture that a viewer would show."""

import contextlib
import os
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import IO, Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from d4m_plugin.errors import InputError
from d4m_plugin.progress import Progress
from d4m_plugin.sources.base import LabelledImages

LARGEST_NATURAL_SIZE = 224  # pixels; what classifiers of photographs see
SAMPLE = 100  # images looked at for the natural size
READ_AT_ONCE = 50  # images, by each process that reads
NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # known to Pillow, which decodes them by other programs

Resize = Literal["crop", "squash"]


def read_image(file: str | Path | IO[bytes], name: str) -> Image.Image:
    """Return an image file's first frame as RGB, upright.

    Args:
        file: a path, or an open file.
        name: what an error calls it.

    Raises:
        InputError: where it is no image, broken, cut off, or above Pillow's limit on pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # at twice as many pixels it is an error
            with Image.open(file, formats=picture_formats()) as image:
                return to_rgb(image)
    except UnidentifiedImageError as error:
        raise InputError(f"{name!r} cannot be read as an image (no format that Pillow knows).") from error
    except Exception as error:  # Pillow's decoders raise anything on broken files
        raise InputError(f"{name!r} cannot be read as an image ({error}).") from error


@cache
def picture_formats() -> list[str]:
    """Return the formats that Pillow decodes by itself."""
    Image.init()
    return [kind for kind in Image.OPEN if kind not in NO_PICTURES]


def size_of(path: str | Path) -> int:
    """Return a file's bytes, -1 where it cannot be asked, as through a dangling link."""
    try:
        return os.path.getsize(path)
    except OSError:
        return -1


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a picture of any mode as RGB: turned as its EXIF says, transparency over white.

    16-bit, 32-bit and float pictures are scaled to 8 bits, not clipped: 16-bit integers by their range, which 32-bit
    ones have too where they lie in it; floats by 255 where they lie in [0, 1]. 32-bit numbers that lie in [0, 255] stay
    as they are, and others are scaled from their own range.
    """
    image.load()
    with contextlib.suppress(Exception):  # EXIF may be broken where the picture is not
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    if image.mode == "LAB":
        return _from_lab(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    floats = np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0)
    least, most = floats.min(), floats.max()
    whole = values.dtype.kind in "iu"
    if values.dtype.itemsize == 2:
        scaled = floats / 257
    elif least >= 0 and not whole and most <= 1:
        scaled = floats * 255
    elif least >= 0 and most <= 255:
        scaled = floats
    elif least >= 0 and whole and most <= 65535:
        scaled = floats / 257
    else:
        scaled = (floats - least) * (255 / (most - least or 1))
    return scaled.round().astype(np.uint8)


def _from_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert converted is not None  # None only where it works in place
    return converted


def to_pixels(image: Image.Image, size: int, resize: Resize = "crop") -> Tensor:
    """Return a picture as a square, uint8, shape (3, size, size), resized with Pillow's bicubic filter.

    Args:
        image: of any size; only the part that is kept is resized, so a long strip costs no more.
        size: edge in pixels.
        resize: `crop` keeps the shape and cuts the middle square out; `squash` keeps all and changes the shape.
    """
    return torch.from_numpy(_square(image, size, resize).copy())


def squares_of(
    images: LabelledImages,
    size: int,
    resize: Resize = "crop",
    chosen: Sequence[int] | None = None,
    num_workers: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """Return images as squares, uint8, shape (N, 3, size, size), each as `to_pixels` makes it.

    Args:
        images: read one by one.
        size: edge in pixels.
        resize: how an image that is not square becomes so.
        chosen: the indices of those that are wanted, in this order; all by default.
        num_workers: processes that read them, where they are more than a few.
        progress: moved on by one for each image.
    """
    chosen = range(len(images)) if chosen is None else chosen
    squares = np.empty((len(chosen), 3, size, size), np.uint8)
    if not len(chosen) > READ_AT_ONCE * num_workers > 0:  # processes take a while to start
        for place, index in enumerate(chosen):
            squares[place] = _square(images[index][0], size, resize)
            if progress is not None:
                progress.update()
        return torch.from_numpy(squares)
    parts: Any = [chosen[start : start + READ_AT_ONCE] for start in range(0, len(chosen), READ_AT_ONCE)]
    own = torch.Generator()  # the loader draws from it, and would from the one that training goes on with
    read = _Squaring(images, size, resize)
    loader = DataLoader(read, None, sampler=parts, num_workers=num_workers, generator=own)
    for number, part in enumerate(loader):
        squares[number * READ_AT_ONCE :][: len(part)] = part
        if progress is not None:
            progress.update(len(part))
    return torch.from_numpy(squares)


class _Squaring(Dataset[Tensor]):
    """Some of a dataset's images at once as squares, by their indices, for the processes of a loader."""

    def __init__(self, images: LabelledImages, size: int, resize: Resize) -> None:
        self.images, self.size, self.resize = images, size, resize

    def __getitem__(self, indices: Sequence[int]) -> Tensor:
        return squares_of(self.images, self.size, self.resize, indices)


def _square(image: Image.Image, size: int, resize: Resize) -> np.ndarray:
    """Return a view of a picture's bytes, shape (3, size, size), to be copied."""
    image = image if image.mode == "RGB" else image.convert("RGB")
    width, height = image.size
    if not width == height == size:
        edge = min(width, height)
        left, top = (width - edge) / 2, (height - edge) / 2
        box = (left, top, left + edge, top + edge) if resize == "crop" else (0, 0, width, height)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box)
    return np.asarray(image).transpose(2, 0, 1)


def natural_size(images: LabelledImages) -> int:
    """Return the edge in pixels that suits a dataset: its images' median shorter edge, at most 224.

    It is taken from a sample of a hundred; images that cannot be read are passed over.
    """
    sizes = []
    for index in range(0, len(images), max(1, len(images) // SAMPLE)):
        with contextlib.suppress(InputError):
            sizes.append(min(images[index][0].size))
    return min(LARGEST_NATURAL_SIZE, int(median(sizes))) if sizes else LARGEST_NATURAL_SIZE
