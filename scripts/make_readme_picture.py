"""Draws docs/digits.png: real digits, their prototypes, and the distilled images, side by side."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2.functional import pil_to_tensor

from d4m_plugin import Digits, Recipe, distill
from d4m_plugin.preview import grid

ROWS, COLUMNS, TITLE = (0, 2, 3, 5, 8), 6, 28


def main() -> None:
    """Distil the digits under the default recipe, or find them distilled, and draw."""
    source = Digits()
    dataset = distill(source, Recipe())
    names = [source.classes[row] for row in ROWS]

    train = source.train()
    members = [[i for i, label in enumerate(train.targets) if label == row][:COLUMNS] for row in ROWS]
    real = grid([torch.stack([pil_to_tensor(train[i][0]) for i in row]) for row in members], names)
    distilled = grid([dataset.images.unflatten(0, (10, 10))[row, :COLUMNS] for row in ROWS], names)
    prototypes = Image.open(dataset.folder / "prototypes.png")
    cell = real.height // len(ROWS)
    rows = [prototypes.crop((0, row * cell, real.width, (row + 1) * cell)) for row in ROWS]

    picture = Image.new("RGB", (3 * real.width, real.height + TITLE), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=15)
    for x, title in enumerate(("real", "prototypes", "distilled")):
        draw.text((x * real.width + real.width // 2, TITLE // 2), title, "black", font, anchor="mm")
    picture.paste(real, (0, TITLE))
    for y, row in enumerate(rows):
        picture.paste(row, (real.width, TITLE + y * cell))
    picture.paste(distilled, (2 * real.width, TITLE))
    Path("docs").mkdir(exist_ok=True)
    picture.save("docs/digits.png")


if __name__ == "__main__":
    main()
