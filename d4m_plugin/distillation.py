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
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm.auto import tqdm

from d4m_plugin.cache import make_writable, resolve_cache_dir, written_whole
from d4m_plugin.card import write_card
from d4m_plugin.diffusion import LatentDiffusion, find_model
from d4m_plugin.distilled import FORMAT, PARQUET, DistilledDataset, checksums, write_parquet
from d4m_plugin.errors import InputError
from d4m_plugin.preview import MAX_COLUMNS, MAX_ROWS, grid
from d4m_plugin.prototypes import Prototypes, cluster
from d4m_plugin.recipe import Recipe, ResolvedRecipe
from d4m_plugin.seeding import generator_of, seed_of
from d4m_plugin.sources import Digits, LabelledImages, Source

VERSIONS = ("d4m-plugin", "torch", "diffusers", "transformers", "scikit-learn")
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
BLOCK = 50  # images a unit of synthesis; fixed, so that the units do not depend on the batch size


def distill(
    source: Source,
    recipe: Recipe | None = None,
    *,
    output: str | Path | None = None,
    cache_dir: str | Path | None = None,
    batch_size: int = BLOCK,
    num_workers: int = 0,
) -> DistilledDataset:
    """Return the distilled set of a source under a recipe, made now or found finished.

    Args:
        source: the real images.
        recipe: what to make; the paper's settings by default.
        output: the folder to make; by default one in the cache, named after source and recipe.
        cache_dir: the cache; by default $D4M_CACHE, else ~/.cache/d4m.
        batch_size: images that the model takes at once; memory and speed, not the set, depend on it.
        num_workers: processes that read real images.

    Raises:
        InputError: where the recipe does not fit the source, the model is unknown, or a folder cannot be used.
    """
    resolved = (recipe or Recipe()).resolved(source)
    if batch_size < 1:
        raise InputError(f"`batch_size` is {batch_size}; it must be at least 1.")
    _check_classes(source, resolved)
    fingerprint = set_fingerprint(source, resolved)
    if output:
        folder = Path(output).resolve()
        make_writable(folder.parent, "output")
    else:
        name = f"{source.name}-{resolved.config_name}-{fingerprint}"
        folder = resolve_cache_dir(cache_dir) / "sets" / name
        folder.parent.mkdir(exist_ok=True)
    work = folder.with_name(f"{folder.name}.partial")
    try:
        lock = FileLock(f"{folder}.lock")
        with lock, torch.random.fork_rng(devices=[]):  # so that training goes on alike from a set made or found
            if not folder.exists() or not any(folder.iterdir()):
                _distil_into(work / fingerprint, fingerprint, source, resolved, batch_size, num_workers)
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
    digest = hashlib.sha256(json.dumps(decides).encode())
    model = Path(find_model(recipe.diffusion))
    if model.is_dir():
        for path in sorted(path for path in model.rglob("*") if path.is_file()):
            digest.update(str(path.relative_to(model)).encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def _check_classes(source: Source, recipe: ResolvedRecipe) -> None:
    names = list(source.classes)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{source.name} has two classes named {twice!r}; give each a name of its own.")
    counts = torch.tensor(source.train().targets).bincount(minlength=len(source.classes))
    smallest = int(counts.argmin())
    if counts[smallest] < recipe.prototypes:
        raise InputError(
            f"`prototypes` is {recipe.prototypes}, but class {source.classes[smallest]!r} has "
            f"{counts[smallest]} images; lower `prototypes` (or `ipc`), or merge classes."
        )


def _distil_into(
    work: Path, fingerprint: str, source: Source, recipe: ResolvedRecipe, batch_size: int, num_workers: int
) -> None:
    """Leave the finished set in `work / "set"`."""
    started = time.perf_counter()
    work.mkdir(parents=True, exist_ok=True)
    model = LatentDiffusion(recipe.diffusion, recipe.diffusion_revision, recipe.scheduler)
    resolution = recipe.resolution or model.resolution

    make_prototypes(work, source, recipe, model, resolution, batch_size, num_workers)
    clustered = time.perf_counter()
    make_images(work, source, recipe, model, batch_size)
    synthesised = time.perf_counter()
    seconds = {"encode_and_cluster": clustered - started, "synthesise": synthesised - clustered}
    _assemble(work, fingerprint, source, recipe, model, seconds)


def make_prototypes(
    work: Path,
    source: Source,
    recipe: ResolvedRecipe,
    model: LatentDiffusion,
    resolution: int,
    batch_size: int,
    num_workers: int,
) -> None:
    """Write the prototypes of each class to `work`, one class in memory at a time; skip classes that are there."""
    todo = [c for c in range(len(source.classes)) if not _class_file(work, c).exists()]
    images = source.train()
    left = int(torch.isin(torch.tensor(images.targets), torch.tensor(todo)).sum())
    with _progress("Encoding", len(images), done=len(images) - left) as progress:
        for label, latents in encode(images, todo, model, resolution, batch_size, num_workers, progress):
            prototypes = cluster(latents, recipe.prototypes, seed_of(recipe.seed, label))
            with written_whole(_class_file(work, label)) as path:
                save_file(dataclasses.asdict(prototypes), path)


def encode(
    images: LabelledImages,
    labels: list[int],
    model: LatentDiffusion,
    resolution: int,
    batch_size: int = BLOCK,
    num_workers: int = 0,
    progress: Any = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield each label with the latents of all its images, float32, shape (N, C, h, w).

    Args:
        images: the real images; only those of `labels` are read.
        labels: the classes to encode, in this order.
        model: whose VAE encodes.
        resolution: edge in pixels that images are resized (bicubic) and centre-cropped to.
        batch_size: images a pass.
        num_workers: processes that read images; the same ones for all classes.
        progress: a tqdm bar to move on by one for each image.
    """
    targets = torch.tensor(images.targets)
    batches = [
        (label, indices.tolist())
        for label in labels
        for indices in (targets == label).nonzero().flatten().split(batch_size)
    ]
    loader = DataLoader(
        _Pixels(images, resolution), batch_sampler=[batch for _, batch in batches], num_workers=num_workers
    )
    latents: list[Tensor] = []
    for position, (pixels, (label, _)) in enumerate(zip(loader, batches, strict=True)):
        latents.append(model.encode(pixels))
        if progress is not None:
            progress.update(len(pixels))
        if position + 1 == len(batches) or batches[position + 1][0] != label:
            yield label, torch.cat(latents)
            latents = []


class _Pixels(Dataset[Tensor]):
    """The images of a dataset alone, uint8, shape (3, size, size)."""

    def __init__(self, images: LabelledImages, size: int) -> None:
        bicubic = v2.InterpolationMode.BICUBIC
        self.images = images
        self.transform = v2.Compose([v2.Resize(size, bicubic), v2.CenterCrop(size), v2.RGB(), v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        pixels: Tensor = self.transform(self.images[index][0])
        return pixels


def make_images(work: Path, source: Source, recipe: ResolvedRecipe, model: LatentDiffusion, batch_size: int) -> None:
    """Write the distilled images to `work` in blocks; skip blocks that are there."""
    wanted = [(label, index) for label in range(len(source.classes)) for index in range(recipe.ipc)]
    blocks = [wanted[start : start + BLOCK] for start in range(0, len(wanted), BLOCK)]
    todo = [number for number in range(len(blocks)) if not _block_file(work, number).exists()]
    left = sum(len(blocks[number]) for number in todo)
    with _progress("Synthesising", len(wanted), done=len(wanted) - left) as progress:
        for number in todo:
            block = blocks[number]
            prototypes = {label: load_prototypes(work, label) for label in {label for label, _ in block}}
            columns = synthesise(block, prototypes, list(source.classes), recipe, model, batch_size)
            with written_whole(_block_file(work, number)) as path:
                save_file(columns, path)
            progress.update(len(block))


def synthesise(
    wanted: list[tuple[int, int]],
    prototypes: dict[int, Prototypes],
    classes: list[str],
    recipe: ResolvedRecipe,
    model: LatentDiffusion,
    batch_size: int = BLOCK,
) -> dict[str, Tensor]:
    """Return distilled images: each prototype noised to `strength` and denoised under its class's prompt.

    Image j of a class starts from prototype j mod K, with noise from a generator seeded by (seed, class, j).

    Args:
        wanted: (label, j) of each image, j in [0, ipc).
        prototypes: those of each label in `wanted`.
        classes: the class names.
        recipe: strength, guidance and the rest.
        model: what denoises and decodes.
        batch_size: images a pass.

    Returns:
        Columns of len(wanted) rows: `image` (uint8, shape (n, 3, H, W)), `label`, `prototype`, `weight`, `seed`.
    """
    indices = [j % recipe.prototypes for _, j in wanted]
    starts = torch.stack([prototypes[c].latents[k] for (c, _), k in zip(wanted, indices, strict=True)])
    prompts = [recipe.prompt_of(classes[c]) for c, _ in wanted]
    images = []
    for start in range(0, len(wanted), batch_size):
        batch = slice(start, start + batch_size)
        latents = model.denoise(
            starts[batch],
            prompts[batch],
            [generator_of(recipe.seed, c, j) for c, j in wanted[batch]],
            negative_prompt=recipe.negative_prompt,
            strength=recipe.strength,
            guidance_scale=recipe.guidance_scale,
            num_inference_steps=recipe.num_inference_steps,
        )
        images.append(model.decode(latents, recipe.image_size))
    return {
        "image": torch.cat(images),
        "label": torch.tensor([c for c, _ in wanted]),
        "prototype": torch.tensor(indices),
        "weight": torch.stack([prototypes[c].weights[k] for (c, _), k in zip(wanted, indices, strict=True)]),
        "seed": torch.tensor([seed_of(recipe.seed, c, j) for c, j in wanted]),
    }


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

    everyone = [load_prototypes(work, label) for label in range(len(classes))]
    tensors = {
        "latents": torch.stack([each.latents for each in everyone]),
        "weights": torch.stack([each.weights for each in everyone]),
    }
    save_file(tensors, folder / "prototypes.safetensors")
    decoded = [model.decode(each.latents[:MAX_COLUMNS]) for each in everyone[:MAX_ROWS]]
    grid(decoded, classes).save(folder / "prototypes.png")

    files = [_block_file(work, number) for number in range(math.ceil(len(classes) * recipe.ipc / BLOCK))]
    write_parquet(folder / PARQUET, classes, map(load_file, files))
    shown = [_first_images(work, label, recipe.ipc) for label in range(min(len(classes), MAX_ROWS))]
    grid(shown, classes).save(folder / "preview.png")

    metadata = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "recipe": dataclasses.asdict(recipe),
        "source": {
            "name": source.name,
            "license": source.license,
            "fingerprint": source.fingerprint,
            "classes": classes,
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "checksums": checksums(folder),
    }
    (folder / "d4m.json").write_text(json.dumps(metadata, indent=2), encoding="utf-8")
    write_card(work / "set", recipe.config_name, metadata)


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


def distill_command(
    output: Path | None = None,
    source: Source | None = None,
    batch_size: int = BLOCK,
    num_workers: int = 0,
    cache_dir: Path | None = None,
    **recipe: Any,
) -> DistilledDataset:
    """Distil a source: `distill` with the recipe's options one by one.

    Args:
        output: the folder to make; by default one in the cache, named after source and recipe.
        source: the real images; scikit-learn's digits by default.
        batch_size: images that the model takes at once; memory and speed, not the set, depend on it.
        num_workers: processes that read real images.
        cache_dir: the cache; by default $D4M_CACHE, else ~/.cache/d4m.
        recipe: options of the Recipe.
    """
    return distill(
        source or Digits(),
        Recipe(**recipe),
        output=output,
        cache_dir=cache_dir,
        batch_size=batch_size,
        num_workers=num_workers,
    )
