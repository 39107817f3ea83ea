"""Distilled images from prototypes: noised, denoised under the class's prompt, decoded (D4M, section 3.2)."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from d4m_plugin.devices import Batches
from d4m_plugin.diffusion import LatentDiffusion
from d4m_plugin.errors import InputError, InputWarning
from d4m_plugin.prototypes import Prototypes
from d4m_plugin.recipe import ResolvedRecipe
from d4m_plugin.seeding import generator_of, seed_of


def open_model(recipe: ResolvedRecipe, compile: bool = False) -> LatentDiffusion:
    """Return the model that a recipe names.

    Raises:
        InputError: where there is no such model, or its schedule has fewer steps than the recipe.
    """
    model = LatentDiffusion(
        recipe.diffusion,
        recipe.diffusion_revision,
        recipe.scheduler,
        recipe.scheduler_options,
        recipe.vae,
        recipe.lora,
        compile=compile,
    )
    most = model.pipeline.scheduler.config.get("num_train_timesteps", recipe.num_inference_steps)
    if recipe.num_inference_steps > most:
        raise InputError(
            f"`num_inference_steps` is {recipe.num_inference_steps}; the model's schedule has {most} steps."
        )
    return model


def synthesise(
    wanted: list[tuple[int, int]],
    prototypes: dict[int, Prototypes],
    prompts: Sequence[str],
    recipe: ResolvedRecipe,
    model: LatentDiffusion,
    batches: Batches | None = None,
) -> dict[str, Tensor]:
    """Return distilled images: each prototype noised to `strength` and denoised under its class's prompt.

    Image j of a class starts from prototype j mod K, of the K that the class has, with noise from a generator seeded
    by (seed, class, j).

    Args:
        wanted: (label, j) of each image, j in [0, ipc).
        prototypes: those of each label in `wanted`.
        prompts: the prompt of each class.
        recipe: strength, guidance and the rest.
        model: what denoises and decodes.
        batches: how many images a pass; all by default.

    Returns:
        Columns of len(wanted) rows: `image` (uint8, shape (n, 3, H, W)), `label`, `prototype`, `weight`, `seed`.

    Warns:
        InputWarning: where an image is of one colour, and is again when made in float32.
    """
    indices = [j % len(prototypes[c].latents) for c, j in wanted]
    starts = torch.stack([prototypes[c].latents[k] for (c, _), k in zip(wanted, indices, strict=True)])

    def make(chosen: Sequence[int]) -> Tensor:
        latents = model.denoise(
            starts[chosen],
            [prompts[wanted[n][0]] for n in chosen],
            [generator_of(recipe.seed, *wanted[n]) for n in chosen],
            negative_prompt=recipe.negative_prompt,
            strength=recipe.strength,
            guidance_scale=recipe.guidance_scale,
            num_inference_steps=recipe.num_inference_steps,
            mode_guidance_scale=recipe.mode_guidance_scale,
            mode_guidance_stop=recipe.mode_guidance_stop,
        )
        return model.decode(latents, recipe.image_size)

    batches, everything = batches or Batches(len(wanted)), list(range(len(wanted)))
    images = torch.cat(batches.run(lambda batch: make(everything[batch]), len(wanted)))
    blank = of_one_colour(images)
    if blank:  # not a number somewhere, most often
        with model.full_precision():
            images[blank] = torch.cat(batches.run(lambda batch: make(blank[batch]), len(blank)))
        if still := of_one_colour(images):
            named = ", ".join(sorted({repr(prompts[wanted[n][0]]) for n in still}))
            sentence = f"{len(still)} images are of one colour, in float32 too, of {named}; look at the preview."
            warnings.warn(sentence, InputWarning, stacklevel=2)
    return {
        "image": images,
        "label": torch.tensor([c for c, _ in wanted]),
        "prototype": torch.tensor(indices),
        "weight": torch.stack([prototypes[c].weights[k] for (c, _), k in zip(wanted, indices, strict=True)]),
        "seed": torch.tensor([seed_of(recipe.seed, c, j) for c, j in wanted]),
    }


def of_one_colour(images: Tensor) -> list[int]:
    """Return which of some images have no two different pixels."""
    pixels = images.flatten(2)
    return (pixels.amax(2) == pixels.amin(2)).all(1).nonzero().flatten().tolist()
