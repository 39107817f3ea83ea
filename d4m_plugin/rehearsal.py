"""Before the long run: what it will take on this machine, and what it will look like."""

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d4m_plugin.cache import make_writable
from d4m_plugin.checking import check_least
from d4m_plugin.devices import Batches
from d4m_plugin.diffusion import LatentDiffusion
from d4m_plugin.distillation import BLOCK, check_classes
from d4m_plugin.encoding import encode
from d4m_plugin.errors import InputError
from d4m_plugin.preview import grid
from d4m_plugin.prototypes import cluster
from d4m_plugin.recipe import Recipe, ResolvedRecipe
from d4m_plugin.screening import WithoutBadImages, readable_source
from d4m_plugin.seeding import generator_of, seed_of
from d4m_plugin.sources import Source
from d4m_plugin.sources.splits import members_by_label
from d4m_plugin.subsets import Chosen, at_most
from d4m_plugin.synthesis import check_denoising, open_model, open_teacher, synthesise, warn_of_prompts

PNG_SHARE = 0.6  # of a photograph's pixels, what a PNG of them takes
MUCH = 1e9  # bytes of the host's memory, which are worth a word
PROBES = 4  # batches that are encoded to measure it, of which the fastest counts


def estimate(
    source: Source,
    recipe: Recipe,
    batch_size: int = BLOCK,
    compile: bool = False,
    num_workers: int = 0,
    keep_latents: bool = False,
) -> dict[str, Any]:
    """Return what a distilling takes: what is to be done, counted, and the time, from a short probe of each stage.

    Args:
        source: the real images, of which a few batches are read and encoded.
        recipe: what to make.
        batch_size: images that the model takes at once.
        compile: compile the model's denoiser; the time that it takes once is not in the estimate.
        num_workers: processes that will read real images; the probe reads in this one.
        keep_latents: count the latents of all real images, which the run will keep in the cache.

    Returns:
        Names of the table's rows, in order, and their values.
    """
    check_least(1, batch_size=batch_size)
    check_classes(source)
    resolved = recipe.resolved(source)
    model = open_model(resolved, compile)
    prompts = resolved.prompts(source.classes)
    warn_of_prompts(prompts, resolved, model)
    resolution = model.check_resolution(resolved.resolution)
    passes = check_denoising(resolved, model, prompts[0], resolution)
    images = source.train()
    if resolved.max_images_per_class is not None:
        images = at_most(images, resolved.max_images_per_class, resolved.seed)
    to_make = resolved.ipc * len(source.classes)
    steps, tries = model.steps_of(resolved.num_inference_steps, resolved.strength), resolved.oversample

    def read(chosen: Tensor) -> None:
        for index in chosen.tolist():
            images[index]

    def encoded(chosen: Tensor) -> Tensor:
        probe = Chosen(images, chosen)
        probe.targets = np.zeros(len(chosen), int)  # as of one class, so that batches are as full as in a long run
        ((_, latents),) = encode(probe, [0], model, resolution, resolved.resize, batch_size)
        return latents

    *probes, unread = torch.arange(min(len(images), (PROBES + 1) * batch_size)).split(batch_size)
    reading = _seconds(partial(read, unread)) / len(unread)  # once: a second time they are in memory
    probes = probes or [unread]
    latents = encoded(probes[0])  # the first of all is slow
    encoding = min(_seconds(partial(encoded, probe)) / len(probe) for probe in probes)
    at_once = min(batch_size, to_make)
    step, once = _denoising(model, latents[:1].expand(at_once, *latents.shape[1:]), source.classes[0], resolved)
    pixels = to_make * resolved.image_size**2 * 3
    prototypes = len(source.classes) * resolved.prototypes * latents[0].numel() * 2  # float16
    of_image = latents[0].numel() * latents.element_size()
    of_class = of_image * max(map(len, members_by_label(images.targets).values()))
    weights = sum(tensor.numel() * tensor.element_size() for part in model.modules for tensor in part.parameters())
    checked = isinstance(source, WithoutBadImages)  # by now
    check_all = 0 if checked else len(images) * reading / max(1, num_workers)
    encode_all = len(images) * encoding
    make_all = to_make * tries * (steps * step + once)
    return {
        "images to encode": f"{len(images):,}, at {resolution} pixels",
        "images to make": f"{to_make:,}, {resolved.ipc} of each of {len(source.classes):,} classes",
        "passes of the model": f"{to_make * tries * passes:,}: {passes} an image, in {steps} steps"
        + (f", {tries} tries" if tries > 1 else ""),
        "on disk": f"{_bytes(pixels * PNG_SHARE + prototypes)}, of which prototypes {_bytes(prototypes)}; twice as "
        "much while the set is written"
        + (f"; {_bytes(of_image * len(images))} of latents, kept in the cache" if keep_latents else ""),
        "memory": f"{_bytes(weights)} of weights{_peak(model.device)}"
        + (f"; {_bytes(of_class)} of a class's latents, less by `max_images_per_class`" if of_class > MUCH else ""),
        "checking, once": f"{_duration(check_all)} ({_rate(reading)} in a process)",
        "encoding": f"{_duration(encode_all)} ({_rate(encoding)})",
        "synthesis": f"{_duration(make_all)} ({_rate(tries * (steps * step + once))})",
        "in all": f"{_duration(check_all + encode_all + make_all)} on this {model.device.type}, and the clustering",
    }


def _peak(device: torch.device) -> str:
    if device.type == "cpu":
        return ""
    return f"; the probe took {_bytes(torch.accelerator.max_memory_allocated(device))} of the {device.type}'s"


def _denoising(model: LatentDiffusion, starts: Tensor, prompt: str, recipe: ResolvedRecipe) -> tuple[float, float]:
    """Return the seconds of an image's step, and of all else that is done for an image."""
    batches = Batches(len(starts))

    def make(steps: int) -> None:
        batches.run(partial(make_some, steps), len(starts))

    def make_some(steps: int, some: slice) -> Tensor:
        indices = range(len(starts))[some]
        denoised = model.denoise(
            starts[some],
            [prompt] * len(indices),
            [generator_of(recipe.seed, 0, index) for index in indices],
            strength=1.0,
            guidance_scale=recipe.guidance_scale,
            num_inference_steps=steps,
        )
        return model.decode(denoised, recipe.image_size)

    # PNDM makes passes more, of all numbers of steps but the least; of those by Runge and Kutta 4 are the least.
    least = 2 if model.pipeline.scheduler.config.get("skip_prk_steps", True) else 4
    make(least)  # the first of all is slow, and finds how many images the memory holds
    few, more = _seconds(partial(make, least)), _seconds(partial(make, 2 * least))
    step = max(more - few, 0) / least
    return step / len(starts), max(few - least * step, 0) / len(starts)


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()  # its product is on the CPU: nothing is left to wait for
    return time.perf_counter() - started


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _rate(seconds: float) -> str:
    return f"{1 / seconds:,.0f} images/s" if seconds < 0.1 else f"{1 / seconds:.3g} images/s"


def _bytes(size: float) -> str:
    power = min(max(int(math.log(max(size, 1), 1000)), 0), 4)
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def preview(
    output: Path = Path("preview.png"),
    source: Source | None = None,
    classes: int = 5,
    images: int = 4,
    of_class: int = 200,
    batch_size: int = BLOCK,
    num_workers: int = 0,
    cache_dir: Path | None = None,
    skip_bad_images: bool = False,
    **recipe: Any,
) -> dict[str, Any]:
    """Draw a few images of a few classes as the recipe would, beside what they start from: prompts and strength, seen.

    Of each class, two rows: the prototypes through the VAE alone, and the images made of them.

    Args:
        output: the picture to write, a .png.
        source: the real images; scikit-learn's digits by default.
        classes: how many, from the first on.
        images: how many of each.
        of_class: real images of a class to cluster, drawn by the seed.
        batch_size: images that the model takes at once.
        num_workers: processes that read real images.
        cache_dir: the cache; by default $D4M_CACHE, else d4m in $XDG_CACHE_HOME or ~/.cache.
        skip_bad_images: leave out images that cannot be read; all are read once to find them.
        recipe: options of the Recipe; `ipc` and `prototypes` are those of `images` here.

    Returns:
        What to tell the user.

    Raises:
        InputError: where an option cannot work.
    """
    check_least(1, classes=classes, images=images, of_class=of_class, batch_size=batch_size)
    if output.suffix != ".png":
        raise InputError(f"`output` is {str(output)!r}; it must end in .png.")
    make_writable(output.resolve().parent, "output")
    source = readable_source(source, skip_bad_images, cache_dir, num_workers)
    check_classes(source)
    recipe |= {"ipc": images, "prototypes": images}
    resolved = Recipe(**recipe).resolved(source)
    model, teacher = open_model(resolved), open_teacher(resolved, source, cache_dir)
    prompts = resolved.prompts(source.classes)
    warn_of_prompts(prompts, resolved, model)
    few = at_most(source.train(), min(of_class, resolved.max_images_per_class or of_class), resolved.seed)
    shown = list(range(min(classes, len(source.classes))))
    resolution = model.check_resolution(resolved.resolution)
    check_denoising(resolved, model, prompts[0], resolution)
    prototypes = {
        label: cluster(latents, images, seed_of(resolved.seed, label))
        for label, latents in encode(few, shown, model, resolution, resolved.resize, batch_size, num_workers)
    }
    wanted = [(label, index) for label in shown for index in range(images)]
    made = synthesise(wanted, prototypes, prompts, resolved, model, teacher, Batches(batch_size))["image"].split(images)
    rows = [model.decode(prototypes[label].latents, resolved.image_size) for label in shown]
    pairs = [row for pair in zip(rows, made, strict=True) for row in pair]
    grid(pairs, [name for label in shown for name in ("prototypes", prompts[label])]).save(output)
    return {"preview": output.resolve(), "rows": "of each class, the prototypes, then the images made of them"}
