"""Draws docs/digits.png: real images, prototypes, distilled images, and accuracies beside random real images.

    python scripts/make_readme_picture.py

docs/cifar10.png is of `--source HuggingFace --source.path cifar10 --diffusion cifar10`, with
`--rows benchmarks/cifar10.jsonl --output docs/cifar10.png`.
"""

import io
import json
import statistics
from pathlib import Path

import torch
from jsonargparse import auto_cli
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file

from d4m_plugin import Digits, LatentDiffusion, Recipe, Source, distill
from d4m_plugin.evaluation.figures import PAIR, new_figure
from d4m_plugin.preview import grid
from d4m_plugin.sources.images import squares_of
from d4m_plugin.sources.splits import members_by_label

COLUMNS, TITLE, BARS = 4, 28, 380


def accuracies(rows: Path, height: int) -> Image.Image:
    """Return a chart of the accuracies of `benchmarks/accuracy.py`, by the embedded models and the paper's training.

    Args:
        rows: its file.
        height: of the chart, in pixels.
    """
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    found = [row for row in found if row["teacher"] in ("auto", "cifar10") and not row["changes"]]
    found = [row for row in found if row["recipe"] in ({}, {"diffusion": "cifar10"})]
    sizes = sorted({row["ipc"] for row in found if row["arm"] == "distilled"})
    figure = new_figure(BARS / 100, height / 100)
    axis = figure.subplots()
    for shift, arm, colour in PAIR:
        of_arm = [[100 * row["accuracy"] for row in found if (row["arm"], row["ipc"]) == (arm, size)] for size in sizes]
        places = [place + shift for place in range(len(sizes))]
        means, errors = list(map(statistics.mean, of_arm)), list(map(statistics.stdev, of_arm))
        bars = axis.bar(places, means, 0.4, yerr=errors, color=colour, label=arm.replace("random", "random real"))
        axis.bar_label(bars, [f"{mean:.1f}" for mean in means], label_type="center", color="white")
    axis.set_xticks(range(len(sizes)), [f"{size}" for size in sizes])
    axis.set(xlabel="images a class", ylabel="accuracy on real test images, %")
    axis.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    content = io.BytesIO()
    figure.savefig(content, dpi=100)
    return Image.open(content)


def main(
    source: Source | None = None,
    output: Path = Path("docs/digits.png"),
    classes: tuple[int, ...] = (0, 2, 3, 5, 8),
    diffusion: str | None = None,
    rows: Path = Path("benchmarks/digits.jsonl"),
) -> None:
    """Distil the source under the default recipe, or find it distilled, and draw.

    Args:
        source: the real images; scikit-learn's digits by default.
        output: the picture.
        classes: the labels of the rows, in order.
        diffusion: as the Recipe takes it.
        rows: accuracies, as `benchmarks/accuracy.py` writes them.
    """
    source = source or Digits()
    recipe = Recipe(diffusion=diffusion)
    dataset = distill(source, recipe)
    model = LatentDiffusion(dataset.recipe["diffusion"])
    latents = load_file(dataset.folder / "prototypes.safetensors")
    train = source.train()
    members = members_by_label(train.targets)

    def real(label: int) -> torch.Tensor:
        return squares_of(train, source.image_size, chosen=members[label][:COLUMNS].tolist())

    parts = {
        "real": [real(label) for label in classes],
        "prototypes": [model.decode(latents[f"{label}.latents"][:COLUMNS]) for label in classes],
        "distilled": [dataset.images.unflatten(0, (-1, recipe.ipc))[label, :COLUMNS] for label in classes],
    }
    names = [source.classes[label] for label in classes]
    grids = [grid(rows, names if title == "real" else [""] * len(names)) for title, rows in parts.items()]
    titles, panels = [*parts, "accuracy"], [*grids, accuracies(rows, grids[0].height)]
    picture = Image.new("RGB", (sum(each.width for each in panels), grids[0].height + TITLE), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=15)
    left = 0
    for title, each in zip(titles, panels, strict=True):
        draw.text((left + each.width // 2, TITLE // 2), title, "black", font, anchor="mm")
        picture.paste(each, (left, TITLE))
        left += each.width
    output.parent.mkdir(exist_ok=True)
    picture.save(output)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
