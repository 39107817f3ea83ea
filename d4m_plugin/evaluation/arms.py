"""What students are trained on: the distilled images, and what they have to beat with as many."""

from collections.abc import Iterator
from functools import cached_property
from typing import Literal, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor

from d4m_plugin.diffusion import LatentDiffusion
from d4m_plugin.distillation import BLOCK, open_model, synthesise
from d4m_plugin.encoding import encode
from d4m_plugin.errors import InputError
from d4m_plugin.evaluation.sets import JudgedSet, Squares
from d4m_plugin.prototypes import Prototypes
from d4m_plugin.recipe import Recipe, ResolvedRecipe
from d4m_plugin.seeding import seed_of
from d4m_plugin.sources import LabelledImages, Source
from d4m_plugin.sources.images import to_pixels
from d4m_plugin.subsets import Chosen, random_subset

Arm = Literal["distilled", "random", "nearest", "decoded", "generated", "reconstructed", "real"]
ARMS: tuple[Arm, ...] = get_args(Arm)


class Arms:
    """The images of each arm, as many as the distilled set has, but for `real`.

    `distilled`: the set. `random`: real training images, drawn anew for each seed. `nearest`: to each prototype, the
    real images whose latents are nearest. `decoded`: the prototypes through the VAE alone. `generated`: by the same
    model and prompts from noise alone, without prototypes. `reconstructed`: those of `random` through the VAE and back,
    which is what the VAE costs. `real`: all real training images.

    Args:
        judged: the distilled set.
        source: the real images that it was distilled from.
        diffusion: where the model lies, where the set's record names a folder.
        batch_size: images that the model takes at once.
    """

    def __init__(
        self, judged: JudgedSet, source: Source, diffusion: str | None = None, batch_size: int = BLOCK
    ) -> None:
        self.judged, self.source, self.diffusion, self.batch_size = judged, source, diffusion, batch_size
        self.ipc = judged.ipc

    def images(self, arm: Arm, seed: int) -> LabelledImages:
        """Return the images of an arm; those of `random` and `reconstructed` depend on the seed.

        Raises:
            InputError: where a class has fewer real images than the set, the set is not one of ours, or it came without
                its prototypes.
        """
        if arm == "distilled":
            return self.judged.squares
        if arm == "random":
            return random_subset(self.source, self.ipc, seed)
        if arm == "reconstructed":
            return self._reconstructed(seed)
        if arm == "real":
            return self.source.train()
        made: LabelledImages = {"nearest": self._nearest, "decoded": self._decoded, "generated": self._generated}[arm]()
        return made

    @cached_property
    def recipe(self) -> ResolvedRecipe:
        """What the set was made by."""
        dataset = self.judged.dataset
        if dataset is None:
            raise InputError(f"`arms` has one that needs the diffusion model, which {self.judged.name} does not tell.")
        return Recipe(**(dataset.recipe | {"diffusion": self.diffusion or dataset.recipe["diffusion"]})).resolved(
            self.source
        )

    @cached_property
    def model(self) -> LatentDiffusion:
        """The diffusion model of the set's recipe."""
        return open_model(self.recipe)

    @cached_property
    def prototypes(self) -> list[Prototypes]:
        """Those of each class."""
        assert self.judged.dataset is not None  # or there were no recipe
        file = self.judged.dataset.folder / "prototypes.safetensors"
        if not file.exists():
            raise InputError(f"{str(file)!r} is missing, which the arms `nearest` and `decoded` need; leave them out.")
        tensors = load_file(file)
        labels = range(len(self.source.classes))
        return [Prototypes(tensors[f"{label}.latents"], tensors[f"{label}.weights"]) for label in labels]

    @property
    def _resolution(self) -> int:
        return self.recipe.resolution or self.model.resolution

    def _decode(self, latents: Tensor) -> Tensor:
        parts = latents.split(self.batch_size)
        return torch.cat([self.model.decode(part, self.judged.image_size) for part in parts])

    def _labels(self) -> list[int]:
        return [label for label in range(len(self.source.classes)) for _ in range(self.ipc)]

    def _decoded(self) -> Squares:
        """Image j of a class is prototype j mod K: where there are fewer prototypes than images, they come again."""
        order = torch.arange(self.ipc)
        starts = [found.latents[order % len(found.latents)] for found in self.prototypes]
        return Squares(self._decode(torch.cat(starts)), self._labels())

    def _generated(self) -> Squares:
        shape = self.model.encode(torch.zeros(1, 3, self._resolution, self._resolution, dtype=torch.uint8)).shape
        nothing = Prototypes(torch.zeros(shape), torch.ones(1))
        recipe = Recipe(**(vars(self.recipe) | {"strength": 1.0})).resolved(self.source)
        wanted = [(label, index) for label in range(len(self.source.classes)) for index in range(self.ipc)]
        blocks = [wanted[start : start + BLOCK] for start in range(0, len(wanted), BLOCK)]
        start = dict.fromkeys(range(len(self.source.classes)), nothing)
        prompts = recipe.prompts(self.source.classes)
        made = [synthesise(block, start, prompts, recipe, self.model)["image"] for block in blocks]
        return Squares(torch.cat(made), self._labels())

    def _reconstructed(self, seed: int) -> Squares:
        chosen = random_subset(self.source, self.ipc, seed)
        latents = list(self._latents_of(chosen))
        labels = [label for label, of_class in latents for _ in range(len(of_class))]
        return Squares(self._decode(torch.cat([of_class for _, of_class in latents])), labels)

    def _nearest(self) -> LabelledImages:
        """Each prototype in turn takes the nearest image that none before it has."""
        train = self.source.train()
        targets = torch.as_tensor(train.targets)
        chosen = []
        for label, latents in self._latents_of(train):
            centres = self.prototypes[label].latents.flatten(1)
            distances = torch.cdist(centres, latents.flatten(1))
            mine: list[int] = []
            for turn in range(min(self.ipc, len(latents))):
                of_prototype = distances[turn % len(centres)]
                of_prototype[mine] = torch.inf
                mine.append(int(of_prototype.argmin()))
            chosen.append((targets == label).nonzero().flatten()[mine])
        return Chosen(train, torch.cat(chosen))

    def _latents_of(self, images: LabelledImages) -> Iterator[tuple[int, Tensor]]:
        labels = sorted(set(torch.as_tensor(images.targets).tolist()))
        return encode(images, labels, self.model, self._resolution, self.judged.resize, self.batch_size)


def slice_of(source: Source, size: int, resize: Literal["crop", "squash"], per_class: int) -> tuple[Tensor, Tensor]:
    """Return some real training images as squares, uint8 (N, 3, size, size), and labels: to choose a learning rate by.

    Args:
        source: the real images.
        size: edge in pixels.
        resize: how an image that is not square becomes so.
        per_class: how many of each class, at most.
    """
    seed = seed_of(-1)  # a draw of its own, whatever the seeds of the arms
    train = source.train()
    counts = torch.as_tensor(train.targets).bincount()
    chosen = random_subset(source, min(per_class, int(counts[counts > 0].min())), seed)
    pixels = torch.stack([to_pixels(chosen[index][0], size, resize) for index in range(len(chosen))])
    return pixels, torch.as_tensor(chosen.targets)
