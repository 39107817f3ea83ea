"""Put a distilled set together from its finished units: parquet, prototypes, pictures, record and card."""

import dataclasses
import io
import json
import platform
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from d4m_plugin.cache import flush
from d4m_plugin.card import write_card
from d4m_plugin.diffusion import EMBEDDED, LICENSE, LatentDiffusion, model_digest
from d4m_plugin.distilled import checksums, png_of, write_parquet
from d4m_plugin.errors import InputWarning
from d4m_plugin.hub import license_of, without_folders
from d4m_plugin.preview import MAX_COLUMNS, MAX_ROWS, grid
from d4m_plugin.recipe import MODELS, ResolvedRecipe
from d4m_plugin.record import FORMAT, ModelRecord, NewRecord, SourceRecord, write_record
from d4m_plugin.screening import WithoutBadImages
from d4m_plugin.sources import Source
from d4m_plugin.units import load_tensors, seconds_of, write_tensors

VERSIONS = ("d4m-plugin", "torch", "diffusers", "transformers", "scikit-learn")


def write_set(
    root: Path,
    fingerprint: str,
    source: Source,
    recipe: ResolvedRecipe,
    model: LatentDiffusion,
    prototypes: Sequence[Path],
    blocks: Sequence[Path],
) -> None:
    """Write a set.

    Args:
        root: its folder, which is made.
        fingerprint: names source, recipe and model.
        source: the real images.
        recipe: what the set was made by.
        model: whose VAE draws the prototypes.
        prototypes: the file of each class.
        blocks: the files of the images, in order.

    Raises:
        DamagedError: where a file is not what was written.
    """
    folder = root / recipe.config_name
    folder.mkdir(parents=True)
    classes = list(source.classes)

    tensors: dict[str, Tensor] = {}
    for label, path in enumerate(prototypes):
        found = load_tensors(path)  # mapped into memory, not held in it
        tensors |= {f"{label}.{name}": tensor for name, tensor in found.items()}
    write_tensors(folder / "prototypes.safetensors", tensors)
    fewer = {str(n): k for n in range(len(classes)) if (k := len(tensors[f"{n}.weights"])) < recipe.prototypes}
    if fewer:
        sentence = (
            f"{len(fewer)} of {len(classes)} classes have fewer different images than `prototypes`, "
            f"{recipe.prototypes}, such as {classes[int(next(iter(fewer)))]!r}: each image is a prototype, and the "
            "rest of `ipc` comes from further noise."
        )
        warnings.warn(sentence, InputWarning, stacklevel=2)
    shown = [tensors[f"{label}.latents"][:MAX_COLUMNS].float() for label in range(min(len(classes), MAX_ROWS))]
    decoded = [model.decode(latents, recipe.image_size) for latents in shown]
    grid(decoded, classes).save(folder / "prototypes.png")

    first: list[list[Tensor]] = [[] for _ in classes[:MAX_ROWS]]
    write_parquet(folder, classes, _noting_the_first(first, map(load_tensors, blocks)))
    grid(list(map(torch.stack, first)), classes).save(folder / "preview.png")

    seconds: Counter[str] = Counter()
    for path in (*prototypes, *blocks):
        seconds.update(seconds_of(path))
    metadata: NewRecord = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "recipe": dataclasses.asdict(recipe) | {name: without_folders(getattr(recipe, name)) for name in MODELS},
        "source": _described(source),
        "model": _described_model(recipe),
        "fewer_prototypes": fewer,
        "versions": versions(),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "checksums": checksums(folder),
    }
    write_record(metadata, folder)
    write_card(root, recipe.config_name, metadata)
    for path in filter(Path.is_file, root.rglob("*")):
        flush(path)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that have a part in what is made here."""
    return {"python": platform.python_version()} | {name: version(name) for name in VERSIONS}


def _noting_the_first(first: list[list[Tensor]], blocks: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Pass blocks on, and note the first images of the first classes."""
    for block in blocks:
        labels = block["label"].tolist()
        if labels[0] < len(first):  # the labels ascend from block to block: most have none of these
            for file, label in zip(png_of(block), labels, strict=True):
                if label < len(first) and len(first[label]) < MAX_COLUMNS:
                    first[label].append(pil_to_tensor(Image.open(io.BytesIO(file))))
        yield block


def _described(source: Source) -> SourceRecord:
    """Return what is told of a source: nothing of where its files lie here."""
    original = source.source if isinstance(source, WithoutBadImages) else source
    kind = type(original)
    skipped = source.skipped if isinstance(source, WithoutBadImages) else []
    for value in original.arguments.values():
        if isinstance(value, str | Path):
            path, name = Path(value).expanduser(), without_folders(value)
            for folder in sorted({str(value), str(path), str(path.resolve())} - {"", "."}, key=len, reverse=True):
                skipped = [fault.replace(folder, name) for fault in skipped]
    skipped = [re.sub(r"(['\"])/((?!\1).)*/", r"\1", fault) for fault in skipped]  # of a library's own cache
    return {
        "name": source.name,
        "class": kind.__name__ if kind.__module__.startswith("d4m_plugin.") else f"{kind.__module__}.{kind.__name__}",
        "arguments": {name: _told(without_folders(value)) for name, value in original.arguments.items()},
        "hub_id": source.hub_id,
        "license": source.license,
        "citation": source.citation,
        "fingerprint": source.fingerprint,
        "classes": list(source.classes),
        "skipped": skipped,
    }


def _told(value: Any) -> Any:
    """Return what JSON can hold of an argument: of an array or an object, what kind of thing it is."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return f"<{type(value).__name__}>"
    return value


def _described_model(recipe: ResolvedRecipe) -> ModelRecord:
    embedded, here = recipe.diffusion in EMBEDDED, Path(recipe.diffusion).exists()
    return {
        "hub_id": None if embedded or here else recipe.diffusion,
        "digest": model_digest(recipe.diffusion) or None,
        "license": LICENSE if embedded else license_of(recipe.diffusion, "model", recipe.diffusion_revision),
    }
