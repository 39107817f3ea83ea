"""A set at a glance: its images in a grid, one row a class."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from d4m_plugin.lettering import font_for

CELL = 64  # pixels: small images are enlarged to it, so that they can be looked at
MAX_ROWS, MAX_COLUMNS = 50, 10


def grid(rows: Sequence[Tensor], names: Sequence[str]) -> Image.Image:
    """Return a picture of images by class, each row named at its left.

    Args:
        rows: the images of each class, uint8, shape (N, 3, H, W); the first 50 classes and 10 images are shown.
        names: the class names, one for each row; those that no font here can write are given by their rows' numbers.
    """
    rows = [row[:MAX_COLUMNS] for row in rows[:MAX_ROWS]]
    edge = rows[0].shape[-1]
    cell = max(edge, CELL // edge * edge)
    labels = [_shortened(name) for name in names[: len(rows)]]
    labels = [label if font_for(label) else f"row {number + 1}" for number, label in enumerate(labels)]
    fonts = [ImageFont.truetype(font_for(label).fname, size=14) for label in labels]
    margin = int(max(font.getlength(label) for font, label in zip(fonts, labels, strict=True))) + 16
    columns = max(len(row) for row in rows)
    picture = Image.new("RGB", (margin + columns * (cell + 2), len(rows) * (cell + 2)), "white")
    draw = ImageDraw.Draw(picture)
    for y, (row, label, font) in enumerate(zip(rows, labels, fonts, strict=True)):
        top = y * (cell + 2)
        draw.text((8, top + cell // 2), label, "black", font, anchor="lm")
        for x, image in enumerate(row):
            tile = to_pil_image(image).resize((cell, cell), Image.Resampling.NEAREST)
            picture.paste(tile, (margin + x * (cell + 2), top))
    return picture


def _shortened(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= 24 else f"{name[:23]}…"
