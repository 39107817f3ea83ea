"""Distilled images from prototypes: noised, denoised under the class's prompt, decoded (D4M, section 3.2)."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from d4m_plugin.devices import Batches, default_device, out_of_memory
from d4m_plugin.diffusion import LatentDiffusion, embedded_prompts
from d4m_plugin.errors import InputError, InputWarning, first_line
from d4m_plugin.prototypes import Prototypes
from d4m_plugin.recipe import ResolvedRecipe
from d4m_plugin.seeding import generator_of, seed_of
from d4m_plugin.sources import Source
from d4m_plugin.teachers import Teacher, tried_teacher


def open_model(recipe: ResolvedRecipe, compile: bool = False) -> LatentDiffusion:
    """Return the model that a recipe names.

    Raises:
        InputError: where there is no such model, or its schedule has not the recipe's steps.
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
    model.check_steps(recipe.num_inference_steps, recipe.strength)
    return model


def check_denoising(recipe: ResolvedRecipe, model: LatentDiffusion, prompt: str, resolution: int) -> int:
    """Denoise a latent of zeros under a recipe's whole schedule, by one pass of the model.

    Returns:
        The passes that each image will take; a step under guidance is two, those of some schedulers are twice as many.

    Raises:
        InputError: where that cannot be done, which would otherwise show when all real images are encoded.
    """
    latents = torch.zeros(1, *model.latent_shape(resolution))
    try:
        with model.answering_once() as answers:
            Batches(1).run(lambda _: _denoise(model, latents, [prompt], [torch.Generator()], recipe), 1)
        return sum(len(answer[0]) for answer in answers)
    except InputError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        scheduler = f" and `scheduler` {recipe.scheduler!r}" if recipe.scheduler else ""
        raise InputError(
            f"`diffusion` is {recipe.diffusion!r}{scheduler}, with which {type(model.pipeline).__name__} makes no "
            f"images ({first_line(error)})."
        ) from error


def warn_of_prompts(prompts: Sequence[str], recipe: ResolvedRecipe, model: LatentDiffusion) -> None:
    """Tell of prompts that the model does not read to their end, or was never shown.

    Warns:
        InputWarning: where there are such.
    """
    if cut := [prompt for prompt in prompts if model.cuts(prompt)]:
        sentence = (
            f"{len(cut)} of {len(prompts)} prompts are longer than the text encoder reads and are cut off, such as "
            f"{cut[0][:60]!r}…; give a shorter name in `class_names`."
        )
        warnings.warn(sentence, InputWarning, stacklevel=2)
    known = [] if recipe.lora else embedded_prompts(recipe.diffusion)
    if known and (unknown := [prompt for prompt in prompts if prompt not in known]):
        sentence = (
            f"`diffusion` is {recipe.diffusion!r}, which was trained on {', '.join(known)} alone and knows nothing of "
            f"{len(unknown)} of {len(prompts)} prompts, such as {unknown[0][:60]!r}; let `prompt` and `class_names` "
            "give these alone, or name a model that knows more: `d4m pretrain` trains one."
        )
        warnings.warn(sentence, InputWarning, stacklevel=2)


def open_teacher(recipe: ResolvedRecipe, source: Source, cache_dir: str | Path | None = None) -> Teacher | None:
    """Return who chooses among a recipe's images, where there is more than one for each that is kept.

    Raises:
        InputError: where there is no such teacher, or it is at chance on real images.
    """
    if recipe.teacher is None:
        return None
    return tried_teacher(recipe.teacher, source, cache_dir, default_device())[0]


def synthesise(
    wanted: list[tuple[int, int]],
    prototypes: dict[int, Prototypes],
    prompts: Sequence[str],
    recipe: ResolvedRecipe,
    model: LatentDiffusion,
    teacher: Teacher | None = None,
    batches: Batches | None = None,
) -> dict[str, Tensor]:
    """Return distilled images: each prototype noised to `strength` and denoised under its class's prompt.

    Image j of a class starts from prototype j mod K, of the K that the class has, with noise from a generator seeded
    by (seed, class, j). Where `oversample` makes more of each, of which the surest for the teacher is kept (as CaO2,
    ICCV 2025, at few images a class), their noises are seeded by (seed, class, j, number) from the second on.

    Args:
        wanted: (label, j) of each image, j in [0, ipc).
        prototypes: those of each label in `wanted`.
        prompts: the prompt of each class.
        recipe: strength, guidance and the rest.
        model: what denoises and decodes.
        teacher: who chooses, where the recipe has one.
        batches: how many images a pass; all by default.

    Returns:
        Columns of len(wanted) rows: `image` (uint8, shape (n, 3, H, W)), `label`, `prototype`, `weight`, `seed`.

    Warns:
        InputWarning: where an image is of one colour, and is again when made in float32.
    """
    indices = [j % len(prototypes[c].latents) for c, j in wanted]
    starts = torch.stack([prototypes[c].latents[k] for (c, _), k in zip(wanted, indices, strict=True)])
    labels = torch.tensor([c for c, _ in wanted])
    batches, everything = batches or Batches(len(wanted)), list(range(len(wanted)))

    def make(chosen: Sequence[int], keys: Sequence[tuple[int, ...]], batches: Batches) -> Tensor:
        def batch(some: slice) -> Tensor:
            texts = [prompts[wanted[n][0]] for n in chosen[some]]
            generators = [generator_of(recipe.seed, *keys[n]) for n in chosen[some]]
            return model.decode(_denoise(model, starts[chosen[some]], texts, generators, recipe), recipe.image_size)

        return torch.cat(batches.run(batch, len(chosen)))

    tries = [[(*each, number) if number else each for each in wanted] for number in range(recipe.oversample)]
    candidates = torch.stack([make(everything, keys, batches) for keys in tries])
    kept = surest(candidates, labels, teacher) if teacher else torch.zeros_like(labels)
    images, keys = candidates[kept, everything], [tries[number][n] for n, number in enumerate(kept.tolist())]
    if blank := of_one_colour(images):  # not a number somewhere, most often
        again = partial(make, blank, keys, Batches(batches.size))
        _make_in_float32(images, blank, again, model, [prompts[label] for label, _ in wanted])
    return {
        "image": images,
        "label": labels,
        "prototype": torch.tensor(indices),
        "weight": torch.stack([prototypes[c].weights[k] for (c, _), k in zip(wanted, indices, strict=True)]),
        "seed": torch.tensor([seed_of(recipe.seed, *key) for key in keys]),
    }


def _make_in_float32(
    images: Tensor, blank: list[int], again: Callable[[], Tensor], model: LatentDiffusion, prompts: Sequence[str]
) -> None:
    """Put what is made `again` of the `blank` images, in float32, in their place; warn where that is of no use."""
    tried = "in float32 too"
    try:
        with model.full_precision():
            images[blank] = again()
    except (RuntimeError, InputError) as error:  # they are worth less than all that is to come
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            raise
        tried = "and the memory does not hold the model in float32"
    if still := of_one_colour(images):
        named = ", ".join(sorted({repr(prompts[n]) for n in still}))
        sentence = f"{len(still)} images are of one colour, {tried}, of {named}; look at the preview."
        warnings.warn(sentence, InputWarning, stacklevel=3)


def _denoise(
    model: LatentDiffusion,
    latents: Tensor,
    prompts: list[str],
    generators: list[torch.Generator],
    recipe: ResolvedRecipe,
) -> Tensor:
    return model.denoise(
        latents,
        prompts,
        generators,
        negative_prompt=recipe.negative_prompt,
        strength=recipe.strength,
        guidance_scale=recipe.guidance_scale,
        num_inference_steps=recipe.num_inference_steps,
        mode_guidance_scale=recipe.mode_guidance_scale,
        mode_guidance_stop=recipe.mode_guidance_stop,
    )


def surest(candidates: Tensor, labels: Tensor, teacher: Teacher) -> Tensor:
    """Return which of each image's candidates a teacher is surest of, int64, shape (n,); the first of several.

    Args:
        candidates: uint8, shape (oversample, n, 3, H, W).
        labels: of the images, int64, shape (n,).
        teacher: on any device. It sees n images at once, so the choice does not depend on the batch size.
    """
    sure = []
    for images in candidates:
        logits = teacher(images.to(teacher.mean.device) / 255).cpu()
        sure.append(logits.log_softmax(1).gather(1, labels[:, None]).flatten())
        sure[-1][of_one_colour(images)] = -torch.inf
    return torch.from_numpy(torch.stack(sure).numpy().argmax(0))


def of_one_colour(images: Tensor) -> list[int]:
    """Return which of some images have no two different pixels."""
    pixels = images.flatten(2)
    return (pixels.amax(2) == pixels.amin(2)).all(1).nonzero().flatten().tolist()
