"""Does a diffusion model get better while it is trained on? What it draws from noise alone, by a teacher's eye.

    d4m pretrain --source HuggingFace --source.path cifar10 --start_from cifar10 --output longer --unet_steps 6000 &
    cp longer.partial/*/unet.ckpt 2000.ckpt  # and so on, every 500 steps
    python benchmarks/learning_curve.py --source HuggingFace --source.path cifar10 --teacher cifar10 \
        --points '{0: cifar10, 2000: 2000.ckpt, 6000: longer}'

A row for each point and guidance scale: the share of the images that the teacher names as their prompt says, and FID,
KID and coverage by its features beside real training images; and two of as many other real images, as they are and
through the VAE. Noises are the same in all rows.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor

from d4m_plugin import Digits, LatentDiffusion, Recipe, Source
from d4m_plugin.devices import Batches
from d4m_plugin.evaluation.figures import new_figure
from d4m_plugin.evaluation.pictures import judge
from d4m_plugin.prototypes import Prototypes
from d4m_plugin.recipe import ResolvedRecipe
from d4m_plugin.sources.images import squares_of
from d4m_plugin.subsets import at_most
from d4m_plugin.synthesis import open_model, synthesise
from d4m_plugin.teachers import load_teacher

BATCH = 100  # images
REAL = 5000  # training images beside which the drawn ones are judged


def drawn(name: str, recipe: ResolvedRecipe, source: Source) -> tuple[Tensor, Tensor]:
    """Return what a model draws of each class from noise, uint8, shape (N, 3, H, W), and the labels, int64, (N,).

    Args:
        name: the recipe's model, or a checkpoint (.ckpt) whose weights it gets.
        recipe: of strength 1.
        source: whose classes.
    """
    model = open_model(recipe)
    if name.endswith(".ckpt"):
        weights = torch.load(name, "cpu", weights_only=True, mmap=True)["state_dict"]
        for part in ("unet", "text_encoder"):
            own = {key.removeprefix(f"{part}."): weights[key] for key in weights if key.startswith(f"{part}.")}
            getattr(model.pipeline, part).load_state_dict(own)
    edge = model.resolution // model.pipeline.vae_scale_factor
    nothing = Prototypes(torch.zeros(1, model.pipeline.vae.config.latent_channels, edge, edge), torch.ones(1))
    classes = range(len(source.classes))
    wanted = [(label, index) for index in range(recipe.ipc) for label in classes]
    made = synthesise(
        wanted, dict.fromkeys(classes, nothing), recipe.prompts(source.classes), recipe, model, batches=Batches(BATCH)
    )
    return made["image"], made["label"]


def through_the_vae(pixels: Tensor, model: LatentDiffusion) -> Tensor:
    """Return images as a model's VAE gives them back."""
    return torch.cat([model.decode(model.encode(batch)) for batch in pixels.split(BATCH)])


def main(
    points: dict[int, str],
    source: Source | None = None,
    teacher: str = "auto",
    guidance_scale: tuple[float, ...] = (1.0, 2.0, 8.0),
    images: int = 50,
    steps: int = 20,
    output: Path = Path("learning_curve.jsonl"),
) -> None:
    """Judge a model at some points of its training; print rows, draw the curve.

    Args:
        points: the model after so many steps of the U-Net: a pipeline, or a checkpoint (.ckpt) of `d4m pretrain` whose
            training started from the first pipeline; of it, the averaged weights.
        source: the real images; scikit-learn's digits by default.
        teacher: as TeacherMatching takes it.
        guidance_scale: of each, a row.
        images: of each class.
        steps: of DPM-Solver++ for each image.
        output: a row a line; rows that are there are not made again. The picture lies beside it.
    """
    source = source or Digits()
    first = next(name for name in points.values() if not name.endswith(".ckpt"))
    judging = load_teacher(teacher, source)
    real = at_most(source.train(), REAL // len(source.classes), seed=0)
    others = at_most(source.train(), images, seed=1)  # as many as are drawn: what no model can beat
    beside = squares_of(real, source.image_size), torch.as_tensor(real.targets)
    rows = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    decides: dict[str, Any] = {"model": first, "teacher": teacher, "images": images, "denoising_steps": steps}

    def add(told: dict[str, Any], make: Callable[[], tuple[Tensor, Tensor]]) -> None:
        if any((decides | told).items() <= row.items() for row in rows):
            return
        figures = judge(judging, teacher, *make(), *beside)
        row = decides | told | {"agreement": figures.agreement, "fid": figures.frechet_distance}
        rows.append(row | {"kid": figures.kernel_distance, "coverage": figures.coverage})
        with output.open("a") as file:
            file.write(f"{json.dumps(rows[-1])}\n")
        print(rows[-1], flush=True)

    pixels, labels = squares_of(others, source.image_size), torch.as_tensor(others.targets)
    add({"images_of": "real"}, lambda: (pixels, labels))
    add({"images_of": "real, through the VAE"}, lambda: (through_the_vae(pixels, LatentDiffusion(first)), labels))
    for step, name in points.items():
        for scale in guidance_scale:
            recipe = Recipe(
                ipc=images,
                prototypes=1,
                diffusion=first if name.endswith(".ckpt") else name,
                strength=1.0,
                guidance_scale=scale,
                num_inference_steps=steps,
                scheduler="DPMSolverMultistepScheduler",
            ).resolved(source)
            told = {"images_of": "model", "step": step, "guidance_scale": scale}
            add(told, partial(drawn, name, recipe, source))
    draw(rows, output.with_suffix(".png"))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw agreement and FID against the steps, a line for each guidance scale, and what as many real images have."""
    figure = new_figure(10, 4)
    panels = (("agreement", "named as prompted, %", 100), ("fid", "FID by the teacher's features", 1))
    drawn_rows = [row for row in rows if row["images_of"] == "model"]
    (real,) = (row for row in rows if row["images_of"] == "real")
    for axis, (name, label, unit) in zip(figure.subplots(1, 2), panels, strict=True):
        for scale in sorted({row["guidance_scale"] for row in drawn_rows}):
            line = sorted((row["step"], unit * row[name]) for row in drawn_rows if row["guidance_scale"] == scale)
            axis.plot(*zip(*line, strict=True), marker="o", label=f"guidance {scale:g}")
        axis.axhline(unit * real[name], color="grey", linestyle="--", label="real images")
        axis.set(xlabel="steps that the U-Net was trained on", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
