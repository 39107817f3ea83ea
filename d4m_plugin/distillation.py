"""Distil a source: encode, cluster and synthesise, in that order (D4M, section 3.2; Algorithm 1).

Work in progress lies in a folder beside the finished set, in units (d4m_plugin/units.py): the prototypes of a class, a
block of images. So a run that was killed goes on with the next unit, and any number of processes share them; the
finished folder appears by one rename.
"""

import dataclasses
import json
import math
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from d4m_plugin.assembling import write_set
from d4m_plugin.cache import aside_of, digest, flush, make_writable, refusal_of, resolve_cache_dir
from d4m_plugin.checking import check_least
from d4m_plugin.devices import Batches
from d4m_plugin.diffusion import LatentDiffusion, model_digest
from d4m_plugin.distilled import DistilledDataset, with_png
from d4m_plugin.encoding import encode
from d4m_plugin.errors import InputError, InputWarning
from d4m_plugin.hub import TRANSFORMERS
from d4m_plugin.progress import Progress, say
from d4m_plugin.prototypes import Prototypes, cluster
from d4m_plugin.recipe import MODELS, Recipe, ResolvedRecipe
from d4m_plugin.record import FORMAT
from d4m_plugin.screening import check_images, check_labels, readable_source
from d4m_plugin.seeding import seed_of
from d4m_plugin.sources import Source
from d4m_plugin.sources.splits import counts_by_label, members_by_label
from d4m_plugin.subsets import at_most
from d4m_plugin.synthesis import check_denoising, open_model, open_teacher, synthesise, warn_of_prompts
from d4m_plugin.teachers import Teacher
from d4m_plugin.units import SILENCE, DamagedError, Units, load_tensors, save_tensors

WRITTEN = "set-is-written"  # the last unit
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

    Any number of processes, on any machines that share the folder, may be told to make the same set: they share the
    work, and each returns the set.

    Args:
        source: the real images.
        recipe: what to make; the paper's settings by default.
        output: the folder to make; by default one in the cache, named after source and recipe.
        cache_dir: the cache; by default $D4M_CACHE, else d4m in $XDG_CACHE_HOME or ~/.cache.
        batch_size: images that the model takes at once; memory and speed depend on it, the set but by rounding.
        num_workers: processes that read real images.
        skip_bad_images: leave out images that cannot be read, and record which; by default they stop the work.
        keep_latents: keep what the VAE made of the real images in the cache (64 kB an image at 512 pixels), so that
            another set of the same source, model and resolution encodes nothing.
        compile: compile the model's denoiser with `torch.compile`: a minute or more first, less time for each image.

    Raises:
        InputError: where the recipe does not fit the source, the model is unknown, an image cannot be read, or a
            folder cannot be used.

    Warns:
        InputWarning: where a class has fewer images than prototypes, a prompt is longer than the model reads, or a file
            of an earlier run is damaged.
    """
    check_least(1, batch_size=batch_size)
    cache = resolve_cache_dir(cache_dir)
    source = readable_source(source, skip_bad_images, cache, num_workers)
    resolved = (recipe or Recipe()).resolved(source)
    check_classes(source)
    fingerprint = set_fingerprint(source, resolved)
    if output:
        folder = Path(output).expanduser().resolve()
        if folder.is_file():
            raise InputError(f"`output` is {str(output)!r}, which is a file; name a folder.")
        if not _is_finished(folder):
            make_writable(folder.parent, "output")
    else:
        folder = cache / "sets" / f"{source.name}-{resolved.config_name}-{fingerprint}"
        folder.parent.mkdir(exist_ok=True)
    work = folder.with_name(f"{folder.name}.partial") / fingerprint
    try:
        with torch.random.fork_rng(devices=[]):  # so that training goes on alike from a set made or found
            options = (batch_size, num_workers, keep_latents, compile)
            _make(folder, work, partial(_distil_into, folder, work, source, resolved, cache, *options))
    except DamagedError as error:  # since it was checked
        raise InputError(f"{error} Start again: it is made anew.") from error
    except OSError as error:
        if refusal := refusal_of(error):
            raise InputError(refusal) from error
        raise
    dataset = DistilledDataset(folder)
    if dataset.metadata["fingerprint"] != fingerprint:
        raise InputError(f"`output` is {str(folder)!r}, a set of another source or recipe; name another folder.")
    _remove(work)
    return dataset


def _make(folder: Path, work: Path, distil: Callable[[], None]) -> None:
    """Leave the finished set in a folder, made in another by this process and others."""
    if not _is_finished(folder):
        work.mkdir(parents=True, exist_ok=True)
        try:
            if not _is_finished(folder):  # still, so that no work is begun in a folder made after the end
                distil()
        except OSError:
            if not _is_finished(folder):  # else another process was first, and removed the work
                raise


def _remove(work: Path) -> None:
    """Remove what a set was made from, which another process may be looking at."""
    removed = work.with_name(f".{work.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)  # what a killed process left of it
    with suppress(OSError):  # there may be nothing
        work.replace(removed)  # all at once
        shutil.rmtree(removed)
    with suppress(OSError):  # another recipe's work may be there
        work.parent.rmdir()


def _is_finished(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def set_fingerprint(source: Source, recipe: ResolvedRecipe) -> str:
    """Return twelve hexadecimal digits that name a source, a recipe, and the weights of a model in a folder."""
    decides = [FORMAT, source.fingerprint, list(source.classes), dataclasses.asdict(recipe)]
    models = [model_digest(model.removeprefix(TRANSFORMERS)) for name in MODELS if (model := getattr(recipe, name))]
    return digest([json.dumps(decides), *models])[:12]


def check_classes(source: Source) -> None:
    """Refuse a source of one class, or with a class that has no training images.

    Raises:
        InputError: where it is one, or a label is no number of a class.
    """
    if len(source.classes) < 2:
        raise InputError(f"{source.name} has the one class {source.classes[0]!r}; there is nothing to tell apart.")
    images = source.train()
    check_labels(source, images)
    counts = counts_by_label(images.targets, len(source.classes))
    if 0 in counts:
        label = counts.index(0)
        raise InputError(f"class {source.classes[label]!r} of {source.name} (label {label}) has no training images.")


def _distil_into(
    folder: Path,
    work: Path,
    source: Source,
    recipe: ResolvedRecipe,
    cache: Path,
    batch_size: int,
    num_workers: int,
    keep_latents: bool,
    compile: bool,
) -> None:
    """Leave the units in `work`, and the finished set in `folder`, where there is none."""
    (work / WRITTEN).unlink(missing_ok=True)  # of a set that was moved or removed since
    model, teacher = open_model(recipe, compile), open_teacher(recipe, source, cache)
    resolution = model.check_resolution(recipe.resolution)
    prompts = recipe.prompts(source.classes)
    warn_of_prompts(prompts, recipe, model)
    if not all(block.exists() for block in block_files(work, recipe, len(prompts))):
        check_denoising(recipe, model, prompts[0], resolution)
    images, fingerprint_of_images = source.train(), source.fingerprint
    if recipe.max_images_per_class is not None:
        images = at_most(images, recipe.max_images_per_class, recipe.seed)
        fingerprint_of_images += f" {recipe.max_images_per_class} {recipe.seed}"
    check_images(source, images, "training images", fingerprint_of_images, cache, num_workers)
    weights = [model_digest(recipe.diffusion) or recipe.diffusion, str(recipe.diffusion_revision), str(model.dtype)]
    weights.append(model_digest(recipe.vae) or recipe.vae if recipe.vae else "")
    decides = [str(FORMAT), fingerprint_of_images, *weights, str(resolution), recipe.resize]
    kept = cache / "latents" / f"{source.name}-{digest(decides)[:12]}"
    if keep_latents:
        kept.mkdir(parents=True, exist_ok=True)

    def encoded(labels: Iterable[int], progress: Progress) -> Iterator[tuple[int, Tensor]]:
        return encode(images, labels, model, resolution, recipe.resize, batch_size, num_workers, progress)

    counts = {label: len(members) for label, members in members_by_label(images.targets).items()}
    tries = f"{recipe.oversample} tries and " if teacher else ""
    steps = model.steps_of(recipe.num_inference_steps, recipe.strength)
    say(f"{len(prompts) * recipe.ipc:,} images to make from {len(images):,}, in {tries}{steps} steps each.")
    make_prototypes(work, counts, encoded, recipe, kept, keep_latents)
    make_images(work, prompts, recipe, model, teacher, batch_size)
    make_set(folder, work, source, recipe, model)


def make_prototypes(
    work: Path,
    counts: Mapping[int, int],
    encoded: Callable[[Iterable[int], Progress], Iterator[tuple[int, Tensor]]],
    recipe: ResolvedRecipe,
    kept: Path,
    keep_latents: bool,
) -> None:
    """Have the prototypes of each class in `work`; one class is clustered while the next is encoded.

    Args:
        work: the folder of the run.
        counts: how many images each label has.
        encoded: gives each of some labels with the latents of its images, float32, shape (N, C, h, w).
        recipe: prototypes and seed.
        kept: the folder of latents that a run was told to keep.
        keep_latents: keep them there.
    """
    labels = {class_file(work, label).name: label for label in counts}
    sizes = {name: counts[label] for name, label in labels.items()}

    def finish(label: int, latents: Tensor, encoding: float, keep: bool) -> None:
        if keep:
            save_tensors(_latents_file(kept, label), {"latents": latents})
        started = time.perf_counter()
        found = cluster(latents, recipe.prototypes, seed_of(recipe.seed, label))
        seconds = {"encode": encoding, "cluster": time.perf_counter() - started}
        save_tensors(class_file(work, label), {"latents": found.latents.half(), "weights": found.weights}, **seconds)

    beside = _Beside()

    def not_encoded(labels: Iterable[int]) -> Iterator[int]:
        for label in labels:
            started = time.perf_counter()
            latents = _read_latents(_latents_file(kept, label))
            if latents is None:
                yield label
            else:
                beside.run(partial(finish, label, latents, time.perf_counter() - started, keep=False))

    with (
        Progress("Encoding", sum(counts.values())) as progress,
        Units(work, sizes, load_tensors, progress) as classes,
        beside,
    ):
        for free in classes.rounds():
            started = time.perf_counter()
            for label, latents in encoded(not_encoded(labels[name] for name in free), progress):
                beside.run(partial(finish, label, latents, time.perf_counter() - started, keep=keep_latents))
                started = time.perf_counter()
            beside.wait()


class _Beside:
    """Work beside this thread, one piece at a time; it does not keep the process from ending."""

    def __init__(self) -> None:
        self._in_hand: Future[None] | None = None

    def __enter__(self) -> "_Beside":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Wait for what is in hand; its error is told where there is no other."""
        try:
            self.wait()
        except BaseException:
            if kind is None:
                raise

    def run(self, work: Callable[[], None]) -> None:
        """Begin a piece of work once the one before it is done."""
        self.wait()
        future = self._in_hand = Future[None]()

        def run() -> None:
            try:
                work()
                future.set_result(None)
            except BaseException as error:  # whoever waits for the result is told
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()

    def wait(self) -> None:
        """Wait for the work to be done; raises what it raised."""
        if self._in_hand:
            self._in_hand.result()


def _read_latents(file: Path) -> Tensor | None:
    """Return the latents of a class, None where they are not kept whole."""
    try:
        return load_tensors(file)["latents"]
    except FileNotFoundError:
        return None
    except DamagedError as error:
        warnings.warn(f"{error} The class is encoded again.", InputWarning, stacklevel=2)
        return None


def make_images(
    work: Path,
    prompts: Sequence[str],
    recipe: ResolvedRecipe,
    model: LatentDiffusion,
    teacher: Teacher | None,
    batch_size: int,
) -> None:
    """Have the distilled images in `work` in blocks, from the prototypes there."""
    wanted = [(label, index) for label in range(len(prompts)) for index in range(recipe.ipc)]
    files = block_files(work, recipe, len(prompts))
    blocks = {file.name: wanted[n * BLOCK : (n + 1) * BLOCK] for n, file in enumerate(files)}
    batches = Batches(batch_size)
    sizes = {name: len(block) for name, block in blocks.items()}

    def finish(name: str, columns: dict[str, Tensor], seconds: float) -> None:
        save_tensors(work / name, with_png(columns), synthesise=seconds)

    with (
        Progress("Synthesising", len(wanted)) as progress,
        Units(work, sizes, load_tensors, progress) as units,
        _Beside() as beside,
    ):
        for free in units.rounds():
            for name in free:
                started = time.perf_counter()
                labels = {label for label, _ in blocks[name]}
                prototypes = {label: load_prototypes(work, label) for label in labels}
                columns = synthesise(blocks[name], prototypes, prompts, recipe, model, teacher, batches)
                beside.run(partial(finish, name, columns, time.perf_counter() - started))
            beside.wait()


def make_set(folder: Path, work: Path, source: Source, recipe: ResolvedRecipe, model: LatentDiffusion) -> None:
    """Have the finished set in `folder`, from the prototypes and blocks in `work`."""
    classes = [class_file(work, label) for label in range(len(source.classes))]
    blocks = block_files(work, recipe, len(classes))
    with (
        Progress("Writing", 1, " set", delay=SILENCE) as progress,
        Units(work, {WRITTEN: 1}, Path.stat, progress) as units,
    ):
        for free in units.rounds():
            for name in free:
                if not _is_finished(folder):
                    own = aside_of(work / "set")
                    shutil.rmtree(own, ignore_errors=True)  # of a process that was killed, and had this one's number
                    try:
                        write_set(own, work.name, source, recipe, model, classes, blocks)
                        own.replace(folder)
                    finally:
                        shutil.rmtree(own, ignore_errors=True)  # as after an error: the disk may be full
                    with suppress(OSError):  # not every file system can
                        flush(folder.parent)
                (work / name).touch()


def load_prototypes(work: Path, label: int) -> Prototypes:
    """Return the prototypes of a class from a run's folder."""
    tensors = load_tensors(class_file(work, label))
    return Prototypes(tensors["latents"].float(), tensors["weights"])


def class_file(work: Path, label: int) -> Path:
    """Return where the prototypes of a class lie while its set is made."""
    return work / f"class-{label:06d}.safetensors"


def block_files(work: Path, recipe: ResolvedRecipe, classes: int) -> list[Path]:
    """Return where the blocks of images lie while their set is made."""
    return [work / f"block-{number:06d}.safetensors" for number in range(math.ceil(classes * recipe.ipc / BLOCK))]


def _latents_file(folder: Path, label: int) -> Path:
    return folder / f"latents-{label:06d}.safetensors"
