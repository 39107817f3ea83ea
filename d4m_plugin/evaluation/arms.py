"""What students are trained on: the distilled images, and what they have to beat with as many."""

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import to_pil_image

from d4m_plugin.cache import digest
from d4m_plugin.devices import default_device
from d4m_plugin.diffusion import LatentDiffusion, model_digest
from d4m_plugin.distillation import BLOCK
from d4m_plugin.distilled import png, read_prototypes, shards
from d4m_plugin.encoding import encode
from d4m_plugin.errors import InputError
from d4m_plugin.evaluation.pictures import features_of
from d4m_plugin.evaluation.sets import JudgedSet, Squares
from d4m_plugin.progress import Progress
from d4m_plugin.prototypes import Prototypes
from d4m_plugin.recipe import Recipe, ResolvedRecipe
from d4m_plugin.seeding import generator_of
from d4m_plugin.sources import LabelledImages, Source
from d4m_plugin.sources.images import Resize, squares_of, to_pixels
from d4m_plugin.sources.splits import counts_by_label, members_by_label
from d4m_plugin.subsets import Chosen, at_most
from d4m_plugin.synthesis import open_model, open_teacher, synthesise
from d4m_plugin.teachers import Teacher, load_teacher, teacher_digest
from d4m_plugin.units import SILENCE, Units, load_tensors, save_tensors

Arm = Literal[
    "distilled",
    "random",
    "equal_bytes",
    "herding",
    "confident",
    "nearest",
    "decoded",
    "generated",
    "reconstructed",
    "real",
]
ARMS: tuple[Arm, ...] = get_args(Arm)
WHAT_ARMS_ARE: dict[Arm, str] = {
    "distilled": "the set",
    "random": "as many real images a class, drawn anew for each seed",
    "equal_bytes": "as many random real images as take the bytes of the set, drawn anew for each seed",
    "herding": "real images that have together, under the teacher, the mean of their class",
    "confident": "the real images that the teacher is surest of",
    "nearest": "the real images nearest to the prototypes",
    "decoded": "the prototypes through the VAE alone",
    "generated": "as many images of the model, without prototypes",
    "reconstructed": "random real images through the VAE and back",
    "real": "all real training images",
}
NEEDED: dict[str, set[Arm]] = {  # of Arms, by which arms
    "network": {"herding", "confident"},
    "model": {"nearest", "decoded", "generated", "reconstructed"},
    "chooser": {"generated"},
    "prototypes": {"nearest", "decoded"},
}


@dataclasses.dataclass(eq=False)
class Arms:
    """The images of each arm, as many of each class as the distilled set has, but for `equal_bytes` and `real`.

    All are squares of the set's size.

    Args:
        judged: the distilled set.
        source: the real images that it was distilled from.
        diffusion: where the model lies, where the set's record names a folder.
        left_out: of the training images, those that no arm may use, int64.
        kept: a folder where images that a model makes or finds are kept: no later training, or command, does it again.
        teacher: who chooses, as TeacherMatching takes it.
        cache_dir: as for D4MDataModule.
        num_workers: processes that read images.
    """

    judged: JudgedSet
    source: Source
    diffusion: str | None = None
    left_out: Tensor | None = None
    kept: Path | None = None
    teacher: str = "auto"
    cache_dir: Path | None = None
    num_workers: int = 0

    @cached_property
    def train(self) -> LabelledImages:
        """The real training images."""
        images = self.source.train()
        if self.left_out is None:
            return images
        return Chosen(images, torch.from_numpy(np.setdiff1d(np.arange(len(images)), self.left_out.numpy())))

    def check(self, arms: Sequence[Arm]) -> None:
        """Find out, before the long work, whether arms can be made.

        Raises:
            InputError: where a class has fewer real images than the set, the set is not one of ours, its model is not
                the one it was made by or cannot be opened, it has no prototypes, there is no teacher, or the source
                does not tell what its images take on disk.
        """
        there = counts_by_label(self.train.targets, len(self.source.classes))
        for name, wanted, count in zip(self.source.classes, self.judged.counts, there, strict=True):
            if count < wanted:
                raise InputError(
                    f"class {name!r} has {count} real training images and {wanted} distilled ones: there is no random "
                    "real subset of as many to compare with."
                )
        for part, needed_by in NEEDED.items():
            if not needed_by.isdisjoint(arms):
                getattr(self, part)
        vars(self).pop("model", None)  # till it is wanted
        if "equal_bytes" in arms and not len(self._fitting):
            raise InputError(
                f"`arms` has 'equal_bytes', but the {self.bytes:,} bytes of the distilled set hold not one of the real "
                f"images, the smallest of which takes {self._stored.min():,}; leave it out."
            )

    def images(self, arm: Arm, seed: int) -> LabelledImages:
        """Return the images of an arm; those of `random`, `equal_bytes` and `reconstructed` depend on the seed."""
        if arm == "distilled":
            return self.judged.squares
        if arm in NEEDED["model"] | NEEDED["network"]:
            return Squares(self._made(arm, seed), self._labels())
        if arm == "real":
            return self._squared(self.train)
        return self._squared(self._random(seed) if arm == "random" else self._within_bytes(seed))

    def _made(self, arm: Arm, seed: int) -> Tensor:
        """Return what a model makes or finds, uint8, shape (N, 3, H, H), class by class."""
        if arm in NEEDED["network"]:
            pixels = self._kept(arm, {arm: partial(self._chosen_by_the_teacher, arm)})
        elif arm == "nearest":
            pixels = self._kept(arm, {arm: self._nearest})
        elif arm == "decoded":
            pixels = self._kept(arm, {arm: self._decoded})
        elif arm == "generated":  # in parts, since all of them are long work
            blocks = range(math.ceil(len(self._labels()) / BLOCK))
            pixels = self._kept(arm, {f"{arm}-{number}": partial(self._generated, number) for number in blocks})
        else:
            pixels = self._kept(arm, {f"{arm}-{seed}": partial(self._reconstructed, seed)})
        vars(self).pop("model", None)  # its memory is the student's now
        return pixels

    def _kept(self, arm: Arm, parts: Mapping[str, Callable[[], Tensor]]) -> Tensor:
        """Return parts as one, each kept under its name and all that decides it; made where it is not there.

        Args:
            arm: whose parts they are.
            parts: what makes each, by its name. Processes that share the folder share them.
        """
        folder = self.kept
        if folder is None:
            return torch.cat([make() for make in parts.values()])
        judged = self.judged
        decides = [self.decided_by(arm), judged.image_size, judged.resize]
        if arm not in ("decoded", "generated"):  # which no real image has a part in
            decides += [self.source.fingerprint, None if self.left_out is None else self.left_out.tolist()]
        if arm in NEEDED["model"]:
            assert judged.dataset is not None  # or there were no model
            decides += [judged.dataset.metadata["recipe"], judged.dataset.metadata["model"]]
        key = digest([json.dumps(decides, sort_keys=True)])[:12]
        makers = {f"{name}-{key}.safetensors": make for name, make in parts.items()}
        folder.mkdir(parents=True, exist_ok=True)
        with (
            Progress("Images of an arm", len(makers), " parts", delay=SILENCE) as progress,
            Units(folder, dict.fromkeys(makers, 1), load_tensors, progress) as units,
        ):
            for free in units.rounds():
                for name in free:
                    save_tensors(folder / name, {"image": makers[name]().contiguous()})
        return torch.cat([load_tensors(folder / name)["image"] for name in makers])

    @cached_property
    def bytes(self) -> int:
        """What the distilled set takes on disk, with labels and all; another's files; another's tensors, as PNG."""
        judged = self.judged
        if judged.dataset is not None:
            return sum(path.stat().st_size for path in shards(judged.dataset.folder))
        if judged.stored is not None:
            return judged.stored
        return sum(len(png(image)) for image in judged.squares.pixels)

    def amount(self, arm: Arm, seeds: int) -> dict[str, int | None]:
        """Return how many `images` an arm has and, where that is counted, `bytes`: of unlike draws, the means."""
        if arm == "equal_bytes":
            drawn = [self._within_bytes(seed) for seed in range(seeds)]
            taken = [int(self._stored[chosen.indices].sum()) for chosen in drawn]
            return {"images": round(statistics.mean(map(len, drawn))), "bytes": round(statistics.mean(taken))}
        if arm == "real":
            return {"images": len(self.train), "bytes": None}
        return {"images": len(self.judged.squares), "bytes": self.bytes if arm == "distilled" else None}

    def decided_by(self, arm: Arm) -> Any:
        """Return what of the set an arm depends on, as JSON can hold it: arms that have it alike are alike."""
        if arm == "random":
            return self.judged.counts
        if arm == "equal_bytes":
            return self.bytes
        if arm in NEEDED["network"]:
            return [self.judged.counts, self._teacher_digest]
        return None if arm == "real" else self.judged.fingerprint

    @cached_property
    def _teacher_digest(self) -> str:
        return teacher_digest(self.teacher)

    @cached_property
    def network(self) -> Teacher:
        """The teacher."""
        return load_teacher(self.teacher, self.source, self.cache_dir).to(default_device()).eval()

    @cached_property
    def recipe(self) -> ResolvedRecipe:
        """What the set was made by."""
        dataset = self.judged.dataset
        if dataset is None:
            raise InputError(f"`arms` has one that needs the diffusion model, which {self.judged.name} does not tell.")
        options = dataset.recipe | {"diffusion": self.diffusion or dataset.recipe["diffusion"]}
        recipe = Recipe(**options).resolved(self.source)
        if (model_digest(recipe.diffusion) or None) != dataset.metadata["model"]["digest"]:
            raise InputError(
                f"`diffusion` is {recipe.diffusion!r}, which is not the model that made the set; name its folder."
            )
        return recipe

    @cached_property
    def model(self) -> LatentDiffusion:
        """The diffusion model of the set's recipe."""
        return open_model(self.recipe)

    @cached_property
    def chooser(self) -> Teacher | None:
        """Who chose among the set's images, where it has several tries."""
        return open_teacher(self.recipe, self.source, self.cache_dir)

    @cached_property
    def prototypes(self) -> list[Prototypes]:
        """Those of each class."""
        dataset = self.judged.dataset
        assert dataset is not None  # or there were no recipe
        dataset.fetch_whole()
        file = dataset.folder / "prototypes.safetensors"
        if not file.exists():
            raise InputError(f"{str(file)!r} is missing, which the arms `nearest` and `decoded` need; leave them out.")
        return read_prototypes(file, dataset.recipe, len(dataset.classes))

    @property
    def _resolution(self) -> int:
        return self.model.check_resolution(self.recipe.resolution)

    def squares_of(self, images: LabelledImages) -> Tensor:
        """Return images as all arms have them, uint8, shape (N, 3, H, H)."""
        return squares_of(images, self.judged.image_size, self.judged.resize, num_workers=self.num_workers)

    def _squared(self, images: LabelledImages) -> "Squared":
        return Squared(images, self.judged.image_size, self.judged.resize)

    def _random(self, seed: int) -> Chosen:
        return at_most(self.train, self.judged.counts, seed)

    @cached_property
    def _stored(self) -> np.ndarray:
        """Bytes of each of the real training images on disk."""
        stored = np.asarray(self.source.stored_bytes())
        return stored if self.left_out is None else np.delete(stored, self.left_out.numpy())

    @cached_property
    def _fitting(self) -> np.ndarray:
        """The real training images that take no more than the whole set."""
        return np.flatnonzero(self._stored <= self.bytes)

    def _within_bytes(self, seed: int) -> Chosen:
        """An image of each class, and again, up to the first that does not fit; no choice is made by size."""
        ordered = at_most(Chosen(self.train, torch.from_numpy(self._fitting)), len(self._fitting), seed)
        indices = self._fitting[ordered.indices]
        turns = np.concatenate([np.arange(count) for count in np.bincount(ordered.targets)])
        indices = indices[np.lexsort((torch.rand(len(turns), generator=generator_of(seed)).numpy(), turns))]
        fits = np.cumsum(self._stored[indices]) <= self.bytes
        return Chosen(self.train, torch.from_numpy(indices[fits]))

    def _labels(self) -> list[int]:
        return [label for label, count in enumerate(self.judged.counts) for _ in range(count)]

    def _decoded(self) -> Tensor:
        """Image j of a class is prototype j mod K: where there are fewer prototypes than images, they come again."""
        order = torch.arange(self.recipe.ipc)
        starts = [found.latents[order % len(found.latents)] for found in self.prototypes]
        return self.model.decode(torch.cat(starts), self.judged.image_size)

    def _generated(self, number: int) -> Tensor:
        """A block of images."""
        start = torch.zeros(1, *self.model.latent_shape(self._resolution))
        nothing = dict.fromkeys(range(len(self.source.classes)), Prototypes(start, torch.ones(1)))
        alone = {"strength": 1.0, "mode_guidance_scale": 0.0}
        recipe = Recipe(**(vars(self.recipe) | alone)).resolved(self.source)
        prompts = recipe.prompts(self.source.classes)
        wanted = [(label, index) for label in range(len(self.source.classes)) for index in range(recipe.ipc)]
        block = wanted[number * BLOCK : (number + 1) * BLOCK]
        return synthesise(block, nothing, prompts, recipe, self.model, self.chooser)["image"]

    def _reconstructed(self, seed: int) -> Tensor:
        latents = list(self._latents_of(self._random(seed)))
        return self.model.decode(torch.cat([of_class for _, of_class in latents]), self.judged.image_size)

    def _chosen_by_the_teacher(self, arm: Arm) -> Tensor:
        return chosen_by(self.network, self.train, self.judged.counts, self.squares_of, arm)

    def _nearest(self) -> Tensor:
        """Each prototype in turn takes the nearest image that none before it has."""
        targets = torch.as_tensor(self.train.targets)
        chosen = []
        for label, latents in self._latents_of(self.train):
            centres = self.prototypes[label].latents.flatten(1)
            distances = torch.cdist(centres, latents.flatten(1))
            mine: list[int] = []
            for turn in range(self.judged.counts[label]):
                of_prototype = distances[turn % len(centres)]
                of_prototype[mine] = torch.inf
                mine.append(int(of_prototype.argmin()))
            chosen.append((targets == label).nonzero().flatten()[mine])
        nearest = Chosen(self.train, torch.cat(chosen))
        return self.squares_of(nearest)

    def _latents_of(self, images: LabelledImages) -> Iterator[tuple[int, Tensor]]:
        labels = sorted(set(torch.as_tensor(images.targets).tolist()))
        return encode(images, labels, self.model, self._resolution, self.recipe.resize, BLOCK, self.num_workers)


def chosen_by(
    network: nn.Module,
    images: LabelledImages,
    counts: Sequence[int],
    to_squares: Callable[[LabelledImages], Tensor],
    arm: Arm,
) -> Tensor:
    """Return the images that a teacher would choose, uint8, class by class, so that those of one are held.

    Args:
        network: the teacher, in evaluation mode.
        images: from which it chooses.
        counts: how many of each label.
        to_squares: gives images as the teacher and the students see them, uint8, shape (N, 3, H, H).
        arm: `herding` for those whose mean feature is the class's, `confident` for those that it is surest of.
    """
    chosen = []
    for label, members in members_by_label(images.targets).items():
        pixels = to_squares(Chosen(images, members))
        features, logits = features_of(network, pixels)
        sure = logits.softmax(1)[:, label].argsort(descending=True, stable=True)
        chosen.append(pixels[herded(features, counts[label]) if arm == "herding" else sure[: counts[label]]])
    return torch.cat(chosen)


def herded(features: Tensor, count: int) -> Tensor:
    """Return the indices of images whose mean feature is, after each one, as near as can be to that of all.

    iCaRL (arXiv:1611.07725), Algorithm 4, on features of length 1.

    Args:
        features: float32, shape (N, D).
        count: how many images, at most N.
    """
    points = F.normalize(features.double())
    mean, total = points.mean(0), torch.zeros_like(points[0])
    chosen: list[int] = []
    for number in range(1, count + 1):
        distances = (mean - (total + points) / number).norm(dim=1)
        distances[chosen] = torch.inf
        chosen.append(int(distances.argmin()))
        total += points[chosen[-1]]
    return torch.tensor(chosen, dtype=torch.int64)


class Squared:
    """Images as squares of a size, which all arms have alike."""

    def __init__(self, images: LabelledImages, size: int, resize: Resize) -> None:
        self.images, self.size, self.resize = images, size, resize
        self.targets = images.targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.images[index]
        return to_pil_image(to_pixels(image, self.size, self.resize)), label
