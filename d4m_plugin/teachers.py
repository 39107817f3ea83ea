"""Where a teacher comes from, what it wants to see, and the order of its classes."""

import copy
import json
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from d4m_plugin.cache import digest, resolve_cache_dir
from d4m_plugin.checking import fault_of, read_json
from d4m_plugin.devices import autocast, compute_dtype
from d4m_plugin.diffusion import ASSETS, EMBEDDED, model_digest
from d4m_plugin.errors import InputError, InputWarning, first_line
from d4m_plugin.hub import TRANSFORMERS
from d4m_plugin.logits import logits_in
from d4m_plugin.models.students import SMALL_IMAGE, create_student
from d4m_plugin.seeding import generator_of
from d4m_plugin.sources import Source
from d4m_plugin.sources.images import squares_of
from d4m_plugin.sources.names import match_classes, readable
from d4m_plugin.units import checksum_of, in_turn, open_tensors, write_tensors

CHANCE_SAMPLE = 256  # real images that a teacher is tried on
CHANCE_BATCH = 32
SMALL_SOURCE = 50_000  # images of at most SMALL_IMAGE pixels: a teacher is trained in minutes
MISSING_LISTED = 10  # names
PROBE = 224  # edge in pixels of images that show what a processor does


class Student(TypedDict):
    """The arguments of `create_student`, in a teacher's file."""

    student: str
    num_classes: int
    image_size: int


class Seen(TypedDict):
    """What a data module tells a checkpoint."""

    classes: list[str]
    mean: list[float]
    std: list[float]


class Teacher(nn.Module):
    """A frozen classifier, with what it was trained on.

    Attributes:
        classes: the class names in the order of its logits.
        known: those of its model, in the order of the model's logits.
        image_size: edge in pixels of its input.
        mean, std: what its input is normalised by, in [0, 1], by channel.
        order: which of the model's logits are those of `classes`, int64.
    """

    mean: Tensor
    std: Tensor
    order: Tensor

    def __init__(
        self,
        model: nn.Module,
        classes: Sequence[str],
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        order: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.known, self.image_size = list(classes), image_size
        order = range(len(self.known)) if order is None else order
        self.classes = [self.known[label] for label in order]
        self.register_buffer("order", torch.tensor(order), persistent=False)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return logits, float32, shape (B, len(classes)), of images in [0, 1], shape (B, 3, H, W).

        Computed in half precision where that is fast.

        Raises:
            InputError: where the model returns none.
        """
        images = images.float()
        if images.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        with autocast(images.device, compute_dtype(images.device)):
            output = self.model((images - self.mean) / self.std)
        logits = logits_in(output, (len(images), len(self.known)))
        if logits is None:
            raise InputError(f"`teacher` returns no logits of {len(self.known)} classes.")
        return logits.float()[:, self.order]

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode, whatever trains around it."""
        return super().train(False)


def load_teacher(
    teacher: str | Path | nn.Module,
    source: Source,
    cache_dir: str | Path | None = None,
    image_size: int | None = None,
) -> Teacher:
    """Return a teacher whose logits are in the order of the source's classes.

    Args:
        teacher: `auto` for the source's own, which is trained and cached where the source is small;
            `torchvision:NAME`, `timm:NAME` (where timm is installed) or `transformers:ID` (of the Hub, or a folder) for
            a pretrained classifier; a checkpoint (.ckpt) of a run with `train_on: real`; a .safetensors file written
            by `save_teacher`; a Teacher; or another module, which takes what the source's students take and is copied.
        source: the real images.
        cache_dir: where teachers trained for `auto` are kept, as for D4MDataModule.
        image_size: edge in pixels of what the source's students take; by default the source's.

    Raises:
        InputError: where there is no such teacher, or a class of the source is not among its classes.
    """
    if isinstance(teacher, Teacher):
        found = teacher
    elif isinstance(teacher, nn.Module):
        size = image_size or source.image_size
        found = Teacher(copy.deepcopy(teacher), source.classes, size, source.mean, source.std)
    else:
        found = _open(str(teacher), source, cache_dir)
    order, missing = match_classes(source.classes, found.classes)
    if missing:
        listed = ", ".join(map(repr, missing[:MISSING_LISTED]))
        more = f" and {len(missing) - MISSING_LISTED} more" if len(missing) > MISSING_LISTED else ""
        raise InputError(
            f"`teacher` is {name_of(teacher)!r}, which does not know {len(missing)} of {len(source.classes)} classes "
            f"of {source.name} ({listed}{more}); use a teacher trained on them (`train_on: real`)."
        )
    if order == list(range(len(found.classes))):
        return found
    mean, std, order = found.mean.flatten().tolist(), found.std.flatten().tolist(), found.order[order].tolist()
    return Teacher(found.model, found.known, found.image_size, mean, std, order)


def name_of(teacher: str | Path | nn.Module) -> str:
    """Return what a teacher is called: its option, or its module's class."""
    if isinstance(teacher, Teacher):
        teacher = teacher.model
    return type(teacher).__name__ if isinstance(teacher, nn.Module) else str(teacher)


def teacher_digest(teacher: str) -> str:
    """Return what tells a teacher from others: what its file or folder holds, else its option."""
    return model_digest(teacher.removeprefix(TRANSFORMERS)) or teacher


def _open(teacher: str, source: Source, cache_dir: str | Path | None) -> Teacher:
    if teacher == "auto" and source.teacher is None:
        return _trained_once(source, cache_dir)
    if teacher == "auto":
        teacher = str(source.teacher)
    if teacher in EMBEDDED:
        return _read_safetensors(ASSETS / teacher / "teacher.safetensors")
    if pretrained := open_pretrained(teacher, "teacher"):
        return pretrained
    path = Path(teacher).expanduser()
    if path.is_file() and path.suffix in (".ckpt", ".safetensors"):
        return _build(*_student_of(path), path) if path.suffix == ".ckpt" else _read_safetensors(path)
    raise InputError(
        f"`teacher` is {teacher!r}, neither auto, {PRETRAINED}, nor an existing .ckpt or .safetensors file."
    )


def open_pretrained(name: str, option: str) -> Teacher | None:
    """Return another library's classifier with its own classes; None where the name is not of the form LIBRARY:NAME.

    Args:
        name: such as `torchvision:resnet18`.
        option: whose value it is.

    Raises:
        InputError: where there is no such classifier.
    """
    library, colon, own_name = name.partition(":")
    if not colon or library not in _LIBRARIES:
        return None
    try:
        return _LIBRARIES[library](own_name)
    except ImportError as error:
        raise InputError(f"`{option}` is {name!r}, but {library} is not installed here.") from error
    except Exception as error:  # of all kinds, for a repository that is something else
        raise InputError(f"`{option}` is {name!r}, which cannot be loaded: {first_line(error)}.") from error


def _trained_once(source: Source, cache_dir: str | Path | None) -> Teacher:
    """Return the teacher of a small source, trained here where it is not in the cache, or not whole."""
    images = len(source.train())
    if source.image_size > SMALL_IMAGE or images > SMALL_SOURCE:
        raise InputError(
            f"`teacher` is 'auto', but {source.name} has none, and its {images:,} images of {source.image_size} pixels "
            "are too many to train one unasked; train one with `train_on: real` and name its checkpoint, name a "
            "pretrained one such as torchvision:resnet18, or set `teacher` to null to train on the labels."
        )
    from d4m_plugin.teaching import train_teacher

    sees = [source.image_size, source.mean, source.std, source.flip]
    key = digest([source.fingerprint, list(source.classes), sees])[:12]
    path = resolve_cache_dir(cache_dir) / "teachers" / f"{source.name}-{key}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with in_turn(path, "trains the teacher"):
        if path.exists():
            try:
                return _read_safetensors(path)
            except InputError as error:
                warnings.warn(f"{error} It is trained again.", InputWarning, stacklevel=2)
        train_teacher(source, path, cache_dir)
    return _read_safetensors(path)


def _from_torchvision(name: str) -> Teacher:
    import torchvision

    weights = torchvision.models.get_model_weights(name).DEFAULT
    transform = weights.transforms()
    if "categories" not in weights.meta or not hasattr(transform, "crop_size"):
        raise ValueError("it is no classifier of images")
    weights.get_state_dict(progress=True, check_hash=True, weights_only=True)  # the next line would run a pickle
    model = torchvision.models.get_model(name, weights=weights)
    return Teacher(model, weights.meta["categories"], transform.crop_size[0], transform.mean, transform.std)


def _from_timm(name: str) -> Teacher:
    import timm

    model = timm.create_model(name, pretrained=True)
    expects = timm.data.resolve_model_data_config(model)
    classes = model.pretrained_cfg.get("label_names")
    if classes is None:
        subset = timm.data.infer_imagenet_subset(model)
        if subset is None:
            raise ValueError("it does not say what its classes are")
        classes = [readable(each) for each in timm.data.ImageNetInfo(subset).label_names()]
    return Teacher(model, classes, expects["input_size"][-1], expects["mean"], expects["std"])


def _from_transformers(name: str) -> Teacher:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    name = os.path.expanduser(name)
    model = AutoModelForImageClassification.from_pretrained(name, dtype=torch.float32)  # whatever it is stored as
    processor = AutoImageProcessor.from_pretrained(name)
    classes = [model.config.id2label[label] for label in range(model.config.num_labels)]
    # Each processor has steps and flags of its own: what they come to is seen in what it makes of three images.
    own_size = getattr(model.config, "image_size", PROBE)  # of one that resizes nothing
    edge = own_size if isinstance(own_size, int) else max(own_size)
    images = [Image.new("RGB", (edge, edge), colour) for colour in ("black", "white", "red")]
    made = processor(images, return_tensors="pt")["pixel_values"]
    black, white, red = made[:, :, made.shape[2] // 2, made.shape[3] // 2]
    std = 1 / (white - black)
    as_it_takes = nn.Sequential(_Mirrored(), model) if red[2] == white[2] else model  # a red pixel's last is its first
    return Teacher(as_it_takes, classes, made.shape[-1], (-black * std).tolist(), std.tolist())


class _Mirrored(nn.Module):
    """The channels of RGB images as BGR."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flip(1)


_LIBRARIES = {"torchvision": _from_torchvision, "timm": _from_timm, "transformers": _from_transformers}
PRETRAINED = ", ".join(f"{library}:NAME" for library in _LIBRARIES)


def _read_safetensors(path: Path) -> Teacher:
    try:
        with open_tensors(path) as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"`teacher` is {str(path)!r}, which is no safetensors file ({error}).") from error
    if not {"student", "data"} <= metadata.keys():
        raise InputError(f"`teacher` is {str(path)!r}, which was not written by `save_teacher`.")
    name = f"`teacher` is {str(path)!r}, which"
    student, data = (
        read_json(metadata[part].encode(), expected, name) for part, expected in (("student", Student), ("data", Seen))
    )
    weights = load_file(path)
    if metadata.get("checksum", found := checksum_of(weights)) != found:  # the embedded have none
        raise InputError(f"{name} is damaged: its checksum differs.")
    return _build(student, data, weights, path)


def save_teacher(checkpoint: Path, output: Path) -> None:
    """Write the student of a checkpoint (`train_on: real`) as a teacher: half precision, without the optimiser."""
    student, data, weights = _student_of(checkpoint)
    halves = {name: _in(torch.float16, weight) for name, weight in weights.items()}
    metadata = {"student": json.dumps(student), "data": json.dumps(data), "checksum": checksum_of(halves)}
    write_tensors(output, halves, metadata)


def _in(dtype: torch.dtype, weight: Tensor) -> Tensor:
    return weight.to(dtype) if weight.is_floating_point() else weight  # as Swin's table of positions is not


def _student_of(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """Return the arguments of `create_student`, what the data module recorded, and the weights."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        student = {name: checkpoint["hyper_parameters"][name] for name in Student.__required_keys__}
        data = next(
            part for part in checkpoint.values() if isinstance(part, dict) and Seen.__required_keys__ <= part.keys()
        )
        state, prefix = checkpoint["state_dict"], "student."
        weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    except Exception as error:  # torch and pickle raise all kinds for a file that is something else
        raise InputError(
            f"`teacher` is {str(path)!r}, which is no checkpoint of an ImageClassifier trained with D4MDataModule."
        ) from error
    return student, data, weights


def _build(student: dict[str, Any], data: dict[str, Any], weights: dict[str, Tensor], path: Path) -> Teacher:
    """Return a teacher of what a file holds; nothing larger is made, but of a RegNet.

    Raises:
        InputError: where its parts do not go together.
    """
    fault = fault_of(student, Student, "student") or fault_of(data, Seen, "data")
    try:
        if fault or len(data["classes"]) != student["num_classes"]:
            raise ValueError(fault or f"{len(data['classes'])} names for {student['num_classes']} classes")
        arguments = (student["student"], student["num_classes"], student["image_size"])
        try:
            with torch.device("meta"):
                model = create_student(*arguments)
        except NotImplementedError:  # a RegNet's, which computes its widths
            model = create_student(*arguments)
        model.load_state_dict({name: _in(torch.float32, weight) for name, weight in weights.items()}, assign=True)
        return Teacher(model, data["classes"], student["image_size"], data["mean"], data["std"])
    except (AttributeError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"`teacher` is {str(path)!r}, whose parts do not go together ({reason}).") from error


def tried_teacher(
    teacher: str | Path | nn.Module,
    source: Source,
    cache_dir: str | Path | None,
    device: torch.device,
    image_size: int | None = None,
) -> tuple[Teacher, str]:
    """Return `load_teacher`'s teacher on a device, and how many real test images it names rightly, in words.

    Raises:
        InputError: as `load_teacher` and `check_above_chance`.
    """
    loaded = load_teacher(teacher, source, cache_dir, image_size).to(device)
    return loaded, check_above_chance(loaded, source)


def check_above_chance(teacher: Teacher, source: Source) -> str:
    """Return how many of a sample of real test images a teacher names rightly, in words.

    Each class of the sample counts alike, so that naming the largest is worth no more than guessing.

    Raises:
        InputError: where that is not three standard deviations above what guessing would reach, or, of few images, not
            halfway from there to all.
    """
    images = source.test()
    chosen = torch.randperm(len(images), generator=generator_of(0))[:CHANCE_SAMPLE].tolist()
    pixels = squares_of(images, teacher.image_size, chosen=chosen)
    labels = torch.as_tensor(images.targets, dtype=torch.int64)[chosen]
    batches = pixels.to(teacher.mean.device).split(CHANCE_BATCH)
    named = torch.cat([teacher(batch / 255).argmax(1) for batch in batches]).cpu()
    counts = labels.bincount()
    counts, rights = counts[counts > 0], labels[named == labels].bincount(minlength=len(counts))[counts > 0]
    accuracy, chance = (rights / counts).mean().item(), 1 / len(counts)
    deviation = math.sqrt(chance * (1 - chance) * (1 / counts).sum().item()) / len(counts)
    least = min(chance + 3 * deviation, (1 + chance) / 2)
    if accuracy < least:
        raise InputError(
            f"`teacher` names {accuracy:.0%} of {len(chosen)} real test images of {source.name} rightly, by class; "
            f"from {least:.0%} on it is told from chance ({chance:.0%}). It has learnt too little, or the order of its "
            "classes or its normalisation is not what it was trained with."
        )
    named_rightly = f"names {accuracy:.0%} of {len(chosen)} real test images of {source.name} rightly, by class"
    return f"{named_rightly} (chance: {chance:.0%})"
