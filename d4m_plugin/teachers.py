"""Where a teacher comes from, what it wants to see, and the order of its classes."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from d4m_plugin.devices import autocast, compute_dtype
from d4m_plugin.diffusion import ASSETS, EMBEDDED
from d4m_plugin.errors import InputError
from d4m_plugin.models.students import create_student
from d4m_plugin.seeding import generator_of
from d4m_plugin.sources import Source
from d4m_plugin.sources.images import to_pixels

CHANCE_SAMPLE = 256  # real images that a teacher is tried on


class Teacher(nn.Module):
    """A frozen classifier, with what it was trained on.

    Attributes:
        classes: the class names in the order of its logits.
        image_size: edge in pixels of its input.
        mean, std: what its input is normalised by, in [0, 1], by channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        classes: Sequence[str],
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.classes, self.image_size = list(classes), image_size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return logits, float32, shape (B, len(classes)), of images in [0, 1], shape (B, 3, H, W).

        Computed in half precision where that is fast.
        """
        if images.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        with autocast(images.device, compute_dtype(images.device)):
            logits: Tensor = self.model((images - self.mean) / self.std)
        return logits.float()

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode, whatever trains around it."""
        return super().train(False)


def load_teacher(teacher: str | Path | Teacher, source: Source) -> Teacher:
    """Return a teacher whose logits are in the order of the source's classes.

    Args:
        teacher: `auto` for the source's own; a checkpoint (.ckpt) of a run with `train_on: real`; a .safetensors
            file written by `save_teacher`; `torchvision:NAME` for a classifier trained on ImageNet; or a Teacher.
        source: the real images.

    Raises:
        InputError: where there is no such teacher, or a class of the source is not among its classes.
    """
    found = teacher if isinstance(teacher, Teacher) else _open(str(teacher), source)
    order, missing = _order(source.classes, found.classes)
    if missing:
        raise InputError(
            f"`teacher` is {_named(teacher)!r}, which does not know {len(missing)} of {len(source.classes)} classes of "
            f"{source.name}, such as {missing[0]!r}; use a teacher trained on them (`train_on: real`)."
        )
    if order == list(range(len(found.classes))):
        return found
    model = nn.Sequential(found.model, _Columns(order))
    return Teacher(model, source.classes, found.image_size, found.mean.flatten().tolist(), found.std.flatten().tolist())


def _order(wanted: Sequence[str], known: Sequence[str]) -> tuple[list[int], list[str]]:
    """Return where each wanted class stands among the known ones, and the wanted ones that do not.

    The second of two classes of one name is the second that the teacher knows by it.
    """
    places: dict[str, list[int]] = {}
    for place, name in enumerate(known):
        places.setdefault(name, []).append(place)
    found = [places[name].pop(0) if places.get(name) else None for name in wanted]
    missing = [name for name, place in zip(wanted, found, strict=True) if place is None]
    return [place for place in found if place is not None], missing


class _Columns(nn.Module):
    """The wanted columns of the logits."""

    order: Tensor

    def __init__(self, order: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor(order), persistent=False)

    def forward(self, logits: Tensor) -> Tensor:
        return logits[:, self.order]


def _named(teacher: str | Path | Teacher) -> str:
    return type(teacher.model).__name__ if isinstance(teacher, Teacher) else str(teacher)


def _open(teacher: str, source: Source) -> Teacher:
    if teacher == "auto":
        if source.teacher is None:
            raise InputError(
                f"`teacher` is 'auto', but {source.name} has none; train one with `train_on: real` and name its "
                "checkpoint, or set `teacher` to null to train on the labels."
            )
        teacher = source.teacher
    if teacher in EMBEDDED:
        return _read_safetensors(ASSETS / teacher / "teacher.safetensors")
    if teacher.startswith("torchvision:"):
        return _from_torchvision(teacher.removeprefix("torchvision:"))
    path = Path(teacher)
    if path.is_file() and path.suffix in (".ckpt", ".safetensors"):
        return _build(*_student_of(path)) if path.suffix == ".ckpt" else _read_safetensors(path)
    raise InputError(
        f"`teacher` is {teacher!r}, neither auto, torchvision:NAME, nor an existing .ckpt or .safetensors file."
    )


def _from_torchvision(name: str) -> Teacher:
    import torchvision

    if name not in torchvision.models.list_models(module=torchvision.models):
        raise InputError(f"`teacher` is 'torchvision:{name}', which torchvision does not have; see its list_models().")
    weights = torchvision.models.get_model_weights(name).DEFAULT
    transform = weights.transforms()
    try:
        model = torchvision.models.get_model(name, weights=weights)
    except OSError as error:
        raise InputError(f"`teacher` is 'torchvision:{name}', whose weights cannot be fetched: {error}") from error
    return Teacher(model, weights.meta["categories"], transform.crop_size[0], transform.mean, transform.std)


def _read_safetensors(path: Path) -> Teacher:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"`teacher` is {str(path)!r}, which is no safetensors file: {error}") from error
    if "student" not in metadata:
        raise InputError(f"`teacher` is {str(path)!r}, which was not written by `save_teacher`.")
    return _build(json.loads(metadata["student"]), json.loads(metadata["data"]), load_file(path))


def save_teacher(checkpoint: Path, output: Path) -> None:
    """Write the student of a checkpoint (`train_on: real`) as a teacher: half precision, without the optimiser."""
    student, data, weights = _student_of(checkpoint)
    metadata = {"student": json.dumps(student), "data": json.dumps(data)}
    save_file({name: weight.half() for name, weight in weights.items()}, output, metadata)


def _student_of(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """Return the arguments of `create_student`, what the data module recorded, and the weights."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        student = {name: checkpoint["hyper_parameters"][name] for name in ("student", "num_classes", "image_size")}
        data = checkpoint["D4MDataModule"]
    except Exception as error:  # torch and pickle raise all kinds for a file that is something else
        raise InputError(
            f"`teacher` is {str(path)!r}, which is no checkpoint of an ImageClassifier trained with D4MDataModule."
        ) from error
    state, prefix = checkpoint["state_dict"], "student."
    return student, data, {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _build(student: dict[str, Any], data: dict[str, Any], weights: dict[str, Tensor]) -> Teacher:
    model = create_student(student["student"], student["num_classes"], student["image_size"])
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return Teacher(model, data["classes"], student["image_size"], data["mean"], data["std"])


def check_above_chance(teacher: Teacher, source: Source) -> None:
    """Refuse a teacher that knows no more of real test images than chance.

    Its accuracy on a sample of them has to be three standard deviations above that of guessing.

    Raises:
        InputError: where it is not.
    """
    images = source.test()
    chosen = torch.randperm(len(images), generator=generator_of(0))[:CHANCE_SAMPLE].tolist()
    pixels = torch.stack([to_pixels(images[index][0], teacher.image_size) for index in chosen])
    labels = torch.as_tensor(images.targets)[chosen]
    accuracy = (teacher(pixels / 255).argmax(1) == labels).float().mean().item()
    chance = 1 / len(source.classes)
    if accuracy < chance + 3 * math.sqrt(chance * (1 - chance) / len(chosen)):
        raise InputError(
            f"`teacher` names {accuracy:.0%} of {len(chosen)} real test images of {source.name} rightly, no more than "
            f"chance ({chance:.0%}); it has learnt too little, or the order of its classes or its normalisation is not "
            "what it was trained with."
        )
