"""Draws docs/digits.png, or docs/cifar10.png with its `--source` and `--output`: real, prototypes, distilled."""

from pathlib import Path

import torch
from jsonargparse import auto_cli
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file

from d4m_plugin import Digits, LatentDiffusion, Recipe, Source, distill
from d4m_plugin.preview import grid
from d4m_plugin.sources.images import to_pixels
from d4m_plugin.sources.splits import members_by_label

COLUMNS, TITLE = 6, 28


def main(
    source: Source | None = None,
    output: Path = Path("docs/digits.png"),
    classes: tuple[int, ...] = (0, 2, 3, 5, 8),
    diffusion: str | None = None,
) -> None:
    """Distil the source under the default recipe, or find it distilled, and draw.

    Args:
        source: the real images; scikit-learn's digits by default.
        output: the picture.
        classes: the labels of the rows, in order.
        diffusion: as the Recipe takes it.
    """
    source = source or Digits()
    recipe = Recipe(diffusion=diffusion)
    dataset = distill(source, recipe)
    model = LatentDiffusion(dataset.recipe["diffusion"])
    latents = load_file(dataset.folder / "prototypes.safetensors")
    train = source.train()
    members = members_by_label(train.targets)

    def real(label: int) -> torch.Tensor:
        chosen = members[label][:COLUMNS].tolist()
        return torch.stack([to_pixels(train[index][0], source.image_size) for index in chosen])

    parts = {
        "real": [real(label) for label in classes],
        "prototypes": [model.decode(latents[f"{label}.latents"][:COLUMNS]) for label in classes],
        "distilled": [dataset.images.unflatten(0, (-1, recipe.ipc))[label, :COLUMNS] for label in classes],
    }
    names = [source.classes[label] for label in classes]
    grids = [grid(rows, names if title == "real" else [""] * len(names)) for title, rows in parts.items()]
    picture = Image.new("RGB", (sum(each.width for each in grids), grids[0].height + TITLE), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=15)
    left = 0
    for title, each in zip(parts, grids, strict=True):
        draw.text((left + each.width // 2, TITLE // 2), title, "black", font, anchor="mm")
        picture.paste(each, (left, TITLE))
        left += each.width
    output.parent.mkdir(exist_ok=True)
    picture.save(output)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
