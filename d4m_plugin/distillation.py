"""Distil a source: encode, cluster and synthesise, in that order (D4M, section 3.2; Algorithm 1).

Work in progress lies in a folder beside the finished set, one file a unit: the prototypes of a class, a block
of images. A unit is written aside and renamed, so a run that was killed resumes with the next unit; the finished
folder appears by one rename.
"""

import dataclasses
import errno
import hashlib
import json
import math
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from d4m_plugin.cache import make_writable, resolve_cache_dir, written_whole
from d4m_plugin.card import write_card
from d4m_plugin.devices import Batches
from d4m_plugin.diffusion import ASSETS, EMBEDDED, LICENSE, LatentDiffusion
from d4m_plugin.distilled import DistilledDataset, checksums, write_parquet
from d4m_plugin.encoding import encode, read_or_encode
from d4m_plugin.errors import InputError, InputWarning
from d4m_plugin.hub import license_of, without_folders
from d4m_plugin.preview import MAX_COLUMNS, MAX_ROWS, grid
from d4m_plugin.prototypes import Prototypes, cluster
from d4m_plugin.recipe import Recipe, ResolvedRecipe
from d4m_plugin.record import FORMAT
from d4m_plugin.screening import WithoutBadImages, check_images
from d4m_plugin.seeding import generator_of, seed_of
from d4m_plugin.sources import Source
from d4m_plugin.sources.splits import members_by_label
from d4m_plugin.subsets import at_most

VERSIONS = ("d4m-plugin", "torch", "diffusers", "transformers", "scikit-learn")
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
MODELS = ("diffusion", "vae", "lora")  # options of a recipe that may name folders
BLOCK = 50  # images a unit of synthesis; fixed, so that the units do not depend on the batch size


def distill(
    source: Source,
    recipe: Recipe | None = None,
    *,
    output: str | Path | None = None,
    cache_dir: str | Path | None = None,
    batch_size: int = BLOCK,
    num_workers: int = 0,
    skip_bad_images: bool = False,
    keep_latents: bool = False,
    compile: bool = False,
) -> DistilledDataset:
    """Return the distilled set of a source under a recipe, made now or found finished.

    Args:
        source: the real images.
        recipe: what to make; the paper's settings by default.
        output: the folder to make; by default one in the cache, named after source and recipe.
        cache_dir: the cache; by default $D4M_CACHE, else ~/.cache/d4m.
        batch_size: images that the model takes at once; memory and speed, not the set, depend on it.
        num_workers: processes that read real images.
        skip_bad_images: leave out images that cannot be read, and record which; by default they stop the work.
        keep_latents: keep what the VAE made of the real images in the cache (64 kB an image at 512 pixels), so that
            another set of the same source, model and resolution encodes nothing.
        compile: compile the model's denoiser with `torch.compile`: a minute or more first, less time for each image.

    Raises:
        InputError: where the recipe does not fit the source, the model is unknown, an image cannot be read, or a
            folder cannot be used.

    Warns:
        InputWarning: where a class has fewer images than prototypes, or a prompt is longer than the model reads.
    """
    if batch_size < 1:
        raise InputError(f"`batch_size` is {batch_size}; it must be at least 1.")
    cache = resolve_cache_dir(cache_dir)
    if skip_bad_images and not isinstance(source, WithoutBadImages):
        source = WithoutBadImages(source, cache, num_workers)
    resolved = (recipe or Recipe()).resolved(source)
    _check_classes(source)
    fingerprint = set_fingerprint(source, resolved)
    if output:
        folder = Path(output).resolve()
        make_writable(folder.parent, "output")
    else:
        name = f"{source.name}-{resolved.config_name}-{fingerprint}"
        folder = cache / "sets" / name
        folder.parent.mkdir(exist_ok=True)
    work = folder.with_name(f"{folder.name}.partial")
    try:
        lock = FileLock(f"{folder}.lock")
        with lock, torch.random.fork_rng(devices=[]):  # so that training goes on alike from a set made or found
            if not folder.exists() or not any(folder.iterdir()):
                options = (batch_size, num_workers, keep_latents, compile)
                _distil_into(work / fingerprint, fingerprint, source, resolved, cache, *options)
                (work / fingerprint / "set").replace(folder)
                shutil.rmtree(work)
        Path(lock.lock_file).unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise InputError(
            f"{str(folder)!r} could not be written ({error.strerror}); what is done is kept: make room and start again."
        ) from error
    dataset = DistilledDataset(folder)
    if dataset.metadata["fingerprint"] != fingerprint:
        raise InputError(f"`output` is {str(folder)!r}, a set of another source or recipe; name another folder.")
    return dataset


def set_fingerprint(source: Source, recipe: ResolvedRecipe) -> str:
    """Return twelve hexadecimal digits that name a source, a recipe, and the weights of a model in a folder."""
    decides = [FORMAT, source.fingerprint, list(source.classes), dataclasses.asdict(recipe)]
    models = [model_digest(model) for name in MODELS if (model := getattr(recipe, name))]
    return _digest([json.dumps(decides), *models])[:12]


def model_digest(model: str) -> str:
    """Return a hash of a model's files, "" for one on the Hub, whose revision names it."""
    place = ASSETS / model if model in EMBEDDED else Path(model)
    files = sorted(place.rglob("*")) if place.is_dir() else [place]
    parts = []
    for path in filter(Path.is_file, files):
        with path.open("rb") as file:
            parts += [str(path.relative_to(place)), hashlib.file_digest(file, "sha256").hexdigest()]
    return _digest(parts) if parts else ""


def _digest(parts: list[str]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _check_classes(source: Source) -> None:
    if len(source.classes) < 2:
        raise InputError(f"{source.name} has the one class {source.classes[0]!r}; there is nothing to tell apart.")
    counts = torch.as_tensor(source.train().targets).bincount(minlength=len(source.classes))
    for label in (counts == 0).nonzero().flatten().tolist():
        raise InputError(f"class {source.classes[label]!r} of {source.name} (label {label}) has no training images.")


def _distil_into(
    work: Path,
    fingerprint: str,
    source: Source,
    recipe: ResolvedRecipe,
    cache: Path,
    batch_size: int,
    num_workers: int,
    keep_latents: bool,
    compile: bool,
) -> None:
    """Leave the finished set in `work / "set"`."""
    started = time.perf_counter()
    work.mkdir(parents=True, exist_ok=True)
    model = open_model(recipe, compile)
    resolution = recipe.resolution or model.resolution
    prompts = recipe.prompts(source.classes)
    _warn_of_cut_prompts(model, prompts)
    images, fingerprint_of_images = source.train(), source.fingerprint
    if recipe.max_images_per_class is not None:
        images = at_most(images, recipe.max_images_per_class, recipe.seed)
        fingerprint_of_images += f" {recipe.max_images_per_class} {recipe.seed}"
    check_images(source, images, "training images", fingerprint_of_images, cache, num_workers)
    weights = [model_digest(recipe.diffusion) or recipe.diffusion, str(recipe.diffusion_revision), str(model.dtype)]
    weights.append(model_digest(recipe.vae) or recipe.vae if recipe.vae else "")
    decides = [str(FORMAT), fingerprint_of_images, *weights, str(resolution), recipe.resize]
    kept = cache / "latents" / f"{source.name}-{_digest(decides)[:12]}"
    screened = time.perf_counter()
    counts = {label: len(members) for label, members in members_by_label(images.targets).items()}
    todo = [label for label in counts if not _class_file(work, label).exists()]
    left = sum(counts[label] for label in todo)
    _say_what_is_to_be_done(left, len(prompts) * recipe.ipc, recipe)
    with _progress("Encoding", len(images), done=len(images) - left) as progress:
        options = (model, resolution, recipe.resize, batch_size, num_workers, progress)
        latents = read_or_encode(todo, kept, keep_latents, lambda labels: encode(images, labels, *options), progress)
        make_prototypes(work, latents, recipe)
    clustered = time.perf_counter()
    make_images(work, prompts, recipe, model, batch_size)
    synthesised = time.perf_counter()
    seconds = {
        "check": screened - started,
        "encode_and_cluster": clustered - screened,
        "synthesise": synthesised - clustered,
    }
    _assemble(work, fingerprint, source, recipe, model, seconds)


def _say_what_is_to_be_done(encode: int, make: int, recipe: ResolvedRecipe) -> None:
    tqdm.write(f"{encode:,} images to encode; {make:,} to make, of {recipe.steps} steps each.", file=sys.stderr)


def open_model(recipe: ResolvedRecipe, compile: bool = False) -> LatentDiffusion:
    """Return the model that a recipe names."""
    return LatentDiffusion(
        recipe.diffusion,
        recipe.diffusion_revision,
        recipe.scheduler,
        recipe.scheduler_options,
        recipe.vae,
        recipe.lora,
        compile=compile,
    )


def _warn_of_cut_prompts(model: LatentDiffusion, prompts: list[str]) -> None:
    cut = [prompt for prompt in prompts if model.cuts(prompt)]
    if cut:
        sentence = (
            f"{len(cut)} of {len(prompts)} prompts are longer than the text encoder reads and are cut off, such as "
            f"{cut[0][:60]!r}…; give a shorter name in `class_names`."
        )
        warnings.warn(sentence, InputWarning, stacklevel=2)


def make_prototypes(work: Path, latents: Iterable[tuple[int, Tensor]], recipe: ResolvedRecipe) -> None:
    """Write the prototypes of each class to `work`; one class is clustered while the next is encoded.

    Args:
        work: the folder of the run.
        latents: each label with the latents of its images, float32, shape (N, C, h, w).
        recipe: prototypes and seed.
    """

    def finish(label: int, points: Tensor) -> None:
        found = cluster(points, recipe.prototypes, seed_of(recipe.seed, label))
        with written_whole(_class_file(work, label)) as path:
            save_file(dataclasses.asdict(found), path)

    with ThreadPoolExecutor(1) as beside:
        last: Future[None] | None = None
        for label, points in latents:
            if last is not None:
                last.result()
            last = beside.submit(finish, label, points)
        if last is not None:
            last.result()


def make_images(
    work: Path, prompts: Sequence[str], recipe: ResolvedRecipe, model: LatentDiffusion, batch_size: int
) -> None:
    """Write the distilled images to `work` in blocks; skip blocks that are there."""
    wanted = [(label, index) for label in range(len(prompts)) for index in range(recipe.ipc)]
    blocks = [wanted[start : start + BLOCK] for start in range(0, len(wanted), BLOCK)]
    batches = Batches(batch_size)
    todo = [number for number in range(len(blocks)) if not _block_file(work, number).exists()]
    left = sum(len(blocks[number]) for number in todo)
    with _progress("Synthesising", len(wanted), done=len(wanted) - left) as progress:
        for number in todo:
            block = blocks[number]
            prototypes = {label: load_prototypes(work, label) for label in {label for label, _ in block}}
            columns = synthesise(block, prototypes, prompts, recipe, model, batches)
            with written_whole(_block_file(work, number)) as path:
                save_file(columns, path)
            progress.update(len(block))


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
        batches: how many images a pass.

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
        )
        return model.decode(latents, recipe.image_size)

    batches, everything = batches or Batches(BLOCK), list(range(len(wanted)))
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


def load_prototypes(work: Path, label: int) -> Prototypes:
    """Return the prototypes of a class from a run's folder."""
    return Prototypes(**load_file(_class_file(work, label)))


def _assemble(
    work: Path,
    fingerprint: str,
    source: Source,
    recipe: ResolvedRecipe,
    model: LatentDiffusion,
    seconds: dict[str, float],
) -> None:
    """Put the units together as a set in `work / "set"`."""
    shutil.rmtree(work / "set", ignore_errors=True)
    folder = work / "set" / recipe.config_name
    folder.mkdir(parents=True)
    classes = list(source.classes)

    tensors: dict[str, Tensor] = {}
    for label in range(len(classes)):
        found = load_prototypes(work, label)  # read from disk only when written: they need not fit in memory at once
        tensors |= {f"{label}.latents": found.latents, f"{label}.weights": found.weights}
    save_file(tensors, folder / "prototypes.safetensors")
    fewer = {str(n): k for n in range(len(classes)) if (k := len(tensors[f"{n}.weights"])) < recipe.prototypes}
    if fewer:
        sentence = (
            f"{len(fewer)} of {len(classes)} classes have fewer different images than `prototypes`, "
            f"{recipe.prototypes}, such as {classes[int(next(iter(fewer)))]!r}: each image is a prototype, and the "
            "rest of `ipc` comes from further noise."
        )
        warnings.warn(sentence, InputWarning, stacklevel=2)
    shown = range(min(len(classes), MAX_ROWS))
    decoded = [model.decode(tensors[f"{label}.latents"][:MAX_COLUMNS]) for label in shown]
    grid(decoded, classes).save(folder / "prototypes.png")

    files = [_block_file(work, number) for number in range(math.ceil(len(classes) * recipe.ipc / BLOCK))]
    write_parquet(folder, classes, map(load_file, files))
    first = [_first_images(work, label, recipe.ipc) for label in shown]
    grid(first, classes).save(folder / "preview.png")

    metadata = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "recipe": dataclasses.asdict(recipe) | {name: without_folders(getattr(recipe, name)) for name in MODELS},
        "source": _described(source),
        "model": _described_model(recipe),
        "fewer_prototypes": fewer,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "checksums": checksums(folder),
    }
    (folder / "d4m.json").write_text(json.dumps(metadata, indent=2), encoding="utf-8")
    write_card(work / "set", recipe.config_name, metadata)


def _described(source: Source) -> dict[str, Any]:
    """Return what is told of a source: nothing of where its files lie here."""
    original = source.source if isinstance(source, WithoutBadImages) else source
    kind = type(original)
    skipped = source.skipped if isinstance(source, WithoutBadImages) else []
    for value in original.arguments.values():
        if (name := without_folders(value)) != value:
            for folder in {str(value), str(Path(value).expanduser()), str(Path(value).expanduser().resolve())}:
                skipped = [fault.replace(folder, name) for fault in skipped]
    return {
        "name": source.name,
        "class": kind.__name__ if kind.__module__.startswith("d4m_plugin.") else f"{kind.__module__}.{kind.__name__}",
        "arguments": {name: without_folders(value) for name, value in original.arguments.items()},
        "hub_id": source.hub_id,
        "license": source.license,
        "citation": source.citation,
        "fingerprint": source.fingerprint,
        "classes": list(source.classes),
        "skipped": skipped,
    }


def _described_model(recipe: ResolvedRecipe) -> dict[str, Any]:
    embedded, here = recipe.diffusion in EMBEDDED, Path(recipe.diffusion).exists()
    return {
        "hub_id": None if embedded or here else recipe.diffusion,
        "digest": model_digest(recipe.diffusion) or None,
        "license": LICENSE if embedded else license_of(recipe.diffusion, "model"),
    }


def _first_images(work: Path, label: int, ipc: int) -> Tensor:
    """Return as many images of a class as a preview shows."""
    images = []
    for position in range(label * ipc, label * ipc + min(ipc, MAX_COLUMNS)):
        with safe_open(_block_file(work, position // BLOCK), "pt") as block:
            images.append(block.get_slice("image")[position % BLOCK])
    return torch.stack(images)


def _class_file(work: Path, label: int) -> Path:
    return work / f"class-{label:06d}.safetensors"


def _block_file(work: Path, number: int) -> Path:
    return work / f"block-{number:06d}.safetensors"


def _progress(stage: str, total: int, done: int) -> "tqdm[Any]":
    return tqdm(total=total, initial=done, desc=stage, unit=" images", dynamic_ncols=True)
