"""Does a diffusion model get better while it is trained on? What it draws from noise alone, by a teacher's eye.

    d4m pretrain --source HuggingFace --source.path cifar10 --start_from cifar10 --output longer --unet_steps 6000 &
    cp longer.partial/*/unet.ckpt 2000.ckpt  # and so on, every 500 steps
    python benchmarks/learning_curve.py --source HuggingFace --source.path cifar10 --teacher cifar10 \
        --points '{0: cifar10, 2000: 2000.ckpt, 6000: longer}'

A row for each point and guidance scale: the share of the images that the teacher names as their prompt says, and
FID and KID by its features beside real training images. Noises are the same in all rows.
"""

import json
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor

from d4m_plugin import Digits, LatentDiffusion, Recipe, Source
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


def drawn(model: LatentDiffusion, recipe: ResolvedRecipe, source: Source) -> tuple[Tensor, Tensor]:
    """Return what the model draws of each class from noise, uint8, shape (N, 3, H, W), and the labels, int64, (N,)."""
    edge = model.resolution // model.pipeline.vae_scale_factor
    nothing = Prototypes(torch.zeros(1, model.pipeline.vae.config.latent_channels, edge, edge), torch.ones(1))
    classes = range(len(source.classes))
    wanted = [(label, index) for index in range(recipe.ipc) for label in classes]
    prompts = recipe.prompts(source.classes)
    parts = [
        synthesise(wanted[start : start + BATCH], dict.fromkeys(classes, nothing), prompts, recipe, model)
        for start in range(0, len(wanted), BATCH)
    ]
    return torch.cat([part["image"] for part in parts]), torch.cat([part["label"] for part in parts])


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
    judging = load_teacher(teacher, source)
    real = at_most(source.train(), REAL // len(source.classes), seed=0)
    real_pixels, real_labels = squares_of(real, source.image_size), torch.as_tensor(real.targets)
    rows = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    first = next(name for name in points.values() if not name.endswith(".ckpt"))
    for step, name in points.items():
        for scale in guidance_scale:
            decides: dict[str, Any] = {"model": first, "teacher": teacher, "step": step, "guidance_scale": scale}
            decides |= {"images": images, "denoising_steps": steps}
            if any(decides.items() <= row.items() for row in rows):
                continue
            recipe = Recipe(
                ipc=images,
                prototypes=1,
                diffusion=first if name.endswith(".ckpt") else name,
                strength=1.0,
                guidance_scale=scale,
                num_inference_steps=steps,
                scheduler="DPMSolverMultistepScheduler",
            ).resolved(source)
            trained = open_model(recipe)
            if name.endswith(".ckpt"):
                weights = torch.load(name, "cpu", weights_only=True, mmap=True)["state_dict"]
                for part in ("unet", "text_encoder"):
                    own = {key.removeprefix(f"{part}."): weights[key] for key in weights if key.startswith(f"{part}.")}
                    getattr(trained.pipeline, part).load_state_dict(own)
            pixels, labels = drawn(trained, recipe, source)
            figures = judge(judging, teacher, pixels, labels, real_pixels, real_labels)
            row = decides | {"agreement": figures.agreement, "fid": figures.frechet_distance}
            row |= {"kid": figures.kernel_distance, "coverage": figures.coverage}
            rows.append(row)
            with output.open("a") as file:
                file.write(f"{json.dumps(row)}\n")
            print(row, flush=True)
    draw(rows, output.with_suffix(".png"))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw agreement and FID against the steps, a line for each guidance scale."""
    figure = new_figure(10, 4)
    panels = (("agreement", "named as prompted, %", 100), ("fid", "FID by the teacher's features", 1))
    for axis, (name, label, unit) in zip(figure.subplots(1, 2), panels, strict=True):
        for scale in sorted({row["guidance_scale"] for row in rows}):
            line = sorted((row["step"], unit * row[name]) for row in rows if row["guidance_scale"] == scale)
            axis.plot(*zip(*line, strict=True), marker="o", label=f"guidance {scale:g}")
        axis.set(xlabel="steps that the U-Net was trained on", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
