"""The distilled set as the training data of any LightningModule, real images as its validation and test data."""

import dataclasses
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
)
from torchvision.transforms import v2

from d4m_plugin.augmentation import augment
from d4m_plugin.cache import resolve_cache_dir
from d4m_plugin.checking import check_least
from d4m_plugin.distillation import BLOCK, distill
from d4m_plugin.distilled import DistilledDataset
from d4m_plugin.errors import InputError, InputWarning
from d4m_plugin.hub import NotOnTheHub
from d4m_plugin.loading import Held, Transformed, hold, hold_squares, loader_of
from d4m_plugin.progress import say
from d4m_plugin.pushing import check_write_access
from d4m_plugin.recipe import Recipe
from d4m_plugin.screening import check_images, fingerprint_of_tests, readable_source
from d4m_plugin.sharing import OthersSet, differences, find_set, listed
from d4m_plugin.sources import LabelledImages, Source
from d4m_plugin.sources.images import Resize, to_pixels
from d4m_plugin.subsets import random_subset

POWERS = {"uniform": 0.0, "share": 1.0, "root": 0.5}  # of a prototype's share, by which its images are drawn


class D4MDataModule(L.LightningDataModule):
    """Builds or finds the distilled set of a source, and trains on it; validates and tests on real images.

    The recipe's options (`ipc`, `strength`, …) are options of this class. The set is distilled when the training
    batches are first asked for: every process gets there (`prepare_data` runs on one while the others wait in a
    collective), and by then every callback's `setup` has checked its options.

    Args:
        source: the real dataset; scikit-learn's digits by default.
        train_on: `distilled`; `real`, all training images; or `random`, as many real images a class as `ipc` says.
        batch_size: images a training batch, at least 1.
        distill_batch_size: images that the diffusion model takes at once; less needs less memory.
        num_workers: processes that read images; squares of the student's size are held in memory and need none.
        skip_bad_images: leave out real images that cannot be read; by default they stop the work.
        keep_latents: keep what the VAE made of the real images in the cache, for other sets of the same source.
        crop_scale: share of the image's area that a random crop covers, least and most.
        flip: mirror half of the training images; by default where the source says that it does no harm.
        weighting: how often each distilled image of a class is drawn: `uniform`, as often as any; by its prototype's
            `share` of the class, or the square `root` of it (DDOQ, arXiv:2501.07681), then with replacement, as many an
            epoch as there are.
        batch_keys: for a model that takes batches as dicts, the names of images and labels in them, such as
            `[image, label]` (torchgeo) or `[pixel_values, labels]` (transformers); by default a batch is a tuple.
        cache_dir: where distilled sets are kept; by default $D4M_CACHE, else d4m in $XDG_CACHE_HOME or ~/.cache.
        set_folder: a finished distilled set to train on, whatever the recipe says.
        hub_id: a dataset repository of the Hub, as user/name, whose set to train on in place of distilling one: options
            of the recipe that are not the defaults must be the set's. A set by another tool, of labelled images, will
            do. Where it is not there, the set is distilled, which is told.
        revision: branch, tag or commit of `hub_id`.
        config_name: which of several sets of `set_folder` or `hub_id`; by default the only one, and of `hub_id` rather
            the one of `ipc`.
        push: put the set in `hub_id` when it is distilled; then all of the recipe must be that of a set there.
        private: make `hub_id` a private repository.
        recipe: options of the Recipe.

    Attributes:
        num_classes: known at once, for the model's construction.
        image_size: edge in pixels of the batches' images.
        resize: how real images that are not square become so: as those of a named set did.
        stored_logits: of the training batch that is at work, float32 (B, classes), on the CPU; see `give_logits`.

    Raises:
        InputError: where an option cannot work.

    Warns:
        InputWarning: where a named set was not distilled from the source's training images as they are given, or the
            Hub has no repository of that name, or hides it, when the set is made.
    """

    def __init__(
        self,
        source: Source | None = None,
        train_on: Literal["distilled", "real", "random"] = "distilled",
        batch_size: int = 100,
        distill_batch_size: int = BLOCK,
        num_workers: int = 0,
        skip_bad_images: bool = False,
        keep_latents: bool = False,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        flip: bool | None = None,
        weighting: Literal["uniform", "share", "root"] = "uniform",
        batch_keys: tuple[str, str] | None = None,
        cache_dir: str | Path | None = None,
        set_folder: str | Path | None = None,
        hub_id: str | None = None,
        revision: str | None = None,
        config_name: str | None = None,
        push: bool = False,
        private: bool = False,
        **recipe: Any,
    ) -> None:
        super().__init__()
        _check_goes_together(train_on, weighting, set_folder, hub_id, revision, config_name, push)
        check_least(1, batch_size=batch_size, distill_batch_size=distill_batch_size)
        if not isinstance(source, Source | None):
            raise InputError(f"`source` is {source!r}; it must be a Source, such as Digits().")
        if len(crop_scale) != 2 or not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise InputError(f"`crop_scale` is {crop_scale}; it must be two shares in (0, 1], the smaller first.")
        if batch_keys is not None and (len(batch_keys) != 2 or batch_keys[0] == batch_keys[1]):
            raise InputError(f"`batch_keys` is {batch_keys}; it must be two names, the images' and the labels'.")
        self.source = readable_source(source, skip_bad_images, cache_dir, num_workers)
        self.recipe = Recipe(**recipe)
        self.train_on, self.num_workers = train_on, num_workers
        self.batch_size, self.distill_batch_size = batch_size, distill_batch_size
        self.crop_scale, self.cache_dir, self.keep_latents = crop_scale, cache_dir, keep_latents
        self.batch_keys = batch_keys
        self.weighting = weighting
        self._logits: Tensor | None = None
        self.stored_logits: Tensor | None = None
        self.flip = self.source.flip if flip is None else flip
        self.num_classes = len(self.source.classes)
        self.hub_id, self.push, self.private = hub_id, push, private
        self.prepare_data_per_node = False  # one process asks for leave to push
        self._not_on_the_hub = ""
        found = self._find_named(set_folder, config_name, revision) if train_on == "distilled" else None
        self._named_set = found if isinstance(found, DistilledDataset) else None
        self._others_set = found if isinstance(found, OthersSet) else None
        if weighting != "uniform" and self._others_set:
            raise InputError(
                f"`weighting` is {weighting!r}, but {hub_id} was distilled by another tool and has no weights."
            )
        named = self._named_set.recipe if self._named_set else None
        self.image_size: int = self.recipe.image_size or (named["image_size"] if named else self.source.image_size)
        self.resize: Resize = named["resize"] if named else self.recipe.resize
        if self._named_set and (caution := self._named_set.caution_of(self.source)):
            rank_zero_warn(caution, category=InputWarning)

    def _find_named(
        self, set_folder: str | Path | None, config_name: str | None, revision: str | None
    ) -> DistilledDataset | OthersSet | None:
        """Return the set in a folder or on the Hub; None where none is named, or the Hub has it not yet."""
        if set_folder:
            found = DistilledDataset(Path(set_folder).expanduser().resolve(), config_name)
            if found.classes != list(self.source.classes):
                raise InputError(
                    f"`set_folder` is {str(set_folder)!r}, whose classes ({listed(found.classes)}) are not those of "
                    f"{self.source.name} ({listed(self.source.classes)}); name the source that it was distilled from."
                )
            # Another `image_size` is that of the training.
            if differs := differences(found, self.source, dataclasses.replace(self.recipe, image_size=None)):
                sentence = f"`set_folder` is {str(set_folder)!r}, which is taken as it is: it has {'; '.join(differs)}."
                rank_zero_warn(sentence, category=InputWarning)
            return found
        if not self.hub_id:
            return None
        try:
            return find_set(self.source, self.recipe, self.hub_id, config_name, revision, exact=self.push)
        except NotOnTheHub as error:
            if revision or config_name:
                raise
            self._not_on_the_hub = str(error)
            return None

    def prepare_data(self) -> None:
        """Before the long work of a set that is to be pushed, ask the Hub for leave."""
        if self.push and self.hub_id and not self._named_set and "distilled" not in vars(self):
            check_write_access(self.hub_id, self.private)

    @cached_property
    def distilled(self) -> DistilledDataset:
        """The distilled set: the one named, else one made or found when first asked for, and pushed if it is to be."""
        if self._named_set:
            return self._named_set
        if self._not_on_the_hub and not self.push:  # a name with a slip in it, or a private one, costs hours
            rank_zero_warn(f"{self._not_on_the_hub} The set is made here.", category=InputWarning)
        elif self.hub_id and not self.push:
            say(f"{self.hub_id} has no {self.recipe.config_name}: the set is made here.")
        with _ended_at_once():
            made = distill(
                self.source,
                self.recipe,
                cache_dir=self.cache_dir,
                batch_size=self.distill_batch_size,
                num_workers=self.num_workers,
                keep_latents=self.keep_latents,
            )
        if self.push and self.hub_id and (self.trainer is None or self.trainer.is_global_zero):
            commit = made.push_to_hub(self.hub_id, private=self.private)
            rank_zero_info(f"Pushed {made.folder.name} to {self.hub_id}, revision {commit}.")
        return made

    @cached_property
    def training_set(self) -> LabelledImages:
        """The images that `train_on` names, before augmentation."""
        if self.train_on == "distilled":
            return self._others_set or self.distilled
        images, fingerprint = self.source.train(), self.source.fingerprint
        if self.train_on == "random":
            images = random_subset(self.source, self.recipe.ipc, self.recipe.seed)
            fingerprint += f" random {self.recipe.ipc} {self.recipe.seed}"
        self._check(images, "training images", fingerprint)
        return images

    def setup(self, stage: str) -> None:
        """Read the real test images once, ever, so that a broken one is known before the long work."""
        images = self.source.test()
        self._check(images, "test images", fingerprint_of_tests(self.source, images))

    def _check(self, images: LabelledImages, what: str, fingerprint: str) -> None:
        check_images(self.source, images, what, fingerprint, resolve_cache_dir(self.cache_dir), self.num_workers)

    def give_logits(self, wanted: bool) -> None:
        """Have the set's stored logits of each training batch as `stored_logits`, or not.

        Raises:
            InputError: where `set_folder` names no set that has them, or the training is not on it.
        """
        named = self._named_set
        if wanted and (named is None or named.logits is None or self.train_on != "distilled"):
            raise InputError(
                "`teacher` is 'stored', which needs a distilled set with a teacher's logits: write them by "
                "`d4m relabel FOLDER`, and name the folder as `set_folder`."
            )
        self._logits, self.stored_logits = named.logits if wanted and named else None, None

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of images, uint8 (B, 3, H, W), and labels, int64 (B,); `augmented` prepares them."""
        dataset: Held | Transformed
        if held := self._held_training_set:
            dataset = held if self._logits is None else Held(*held.tensors, self._logits)
            sampler = self._sampler(held)
        else:
            transform = v2.Compose(
                [
                    v2.RGB(),
                    v2.ToImage(),
                    v2.RandomResizedCrop(self.image_size, self.crop_scale, antialias=True),
                    v2.RandomHorizontalFlip(0.5 if self.flip else 0.0),
                ]
            )
            dataset = Transformed(self.training_set, transform)
            sampler = RandomSampler(dataset)
        own = math.ceil(len(dataset) / (self.trainer.world_size if self.trainer else 1))  # of this process
        alone = 1 < self.batch_size < own and own % self.batch_size == 1  # batch norm has no variance of one image
        return loader_of(dataset, sampler, self.batch_size, self.num_workers, drop_last=alone)

    def val_dataloader(self) -> DataLoader[Any]:
        """Real test images, resized and centre-cropped: nothing here chooses by them, the last epoch counts."""
        images = self.held_test_set or Transformed(self.source.test(), self._square)
        return loader_of(images, SequentialSampler(images), self.batch_size, self.num_workers)

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    @property
    def _at_work(self) -> L.Trainer:
        """The trainer that calls a hook."""
        assert self.trainer is not None
        return self.trainer

    def on_before_batch_transfer(self, batch: tuple[Tensor, ...], dataloader_idx: int) -> Any:
        """Keep the stored logits of a training batch apart, so that no hook of a module or callback meets them."""
        if self._logits is not None and self._at_work.training:
            batch, self.stored_logits = batch[:-1], batch[-1]
        return self._by_the_modules_own("on_before_batch_transfer", batch, dataloader_idx)

    def on_after_batch_transfer(self, batch: tuple[Tensor, ...], dataloader_idx: int) -> Any:
        """Augment a training batch, normalise any other, on the device that the trainer has moved it to."""
        images, labels = batch
        if images.dtype != torch.uint8:
            raise InputError(
                f"images of a batch are {images.dtype}, before D4MDataModule normalises them; it takes them as uint8."
            )
        images = (self.augmented if self._at_work.training else self.normalised)(images)
        images = self._at_work.precision_plugin.convert_input(images)  # it saw uint8, before
        return self._by_the_modules_own("on_after_batch_transfer", self.packed(images, labels), dataloader_idx)

    def _by_the_modules_own(self, hook: str, batch: Any, dataloader_idx: int) -> Any:
        """Return what a module's own hook, which Lightning leaves out where the data has one, makes of a batch."""
        module = self._at_work.lightning_module
        return getattr(module, hook)(batch, dataloader_idx) if is_overridden(hook, module) else batch

    def packed(self, images: Tensor, labels: Tensor) -> Any:
        """Return a batch of images and labels as the model takes it."""
        return dict(zip(self.batch_keys, (images, labels), strict=True)) if self.batch_keys else (images, labels)

    def unpacked(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the images and labels of a batch, whatever a module's own hook put beside them."""
        images, labels = (batch[key] for key in self.batch_keys or (0, 1))
        return images, labels

    def repacked(self, batch: Any, images: Tensor, labels: Tensor) -> Any:
        """Return a batch with other images and labels."""
        return {**batch, **self.packed(images, labels)} if self.batch_keys else (images, labels, *batch[2:])

    def augmented(self, images: Tensor) -> Tensor:
        """Return what the student sees of training images, uint8 (B, 3, H, W): cropped, flipped and normalised."""
        if not self._held_training_set:
            return self.normalised(images)  # cropped and flipped by the loader, from the whole image
        return self._normalise(augment(images.float() / 255, self.crop_scale, self.flip))

    def normalised(self, images: Tensor) -> Tensor:
        """Return images, uint8 (B, 3, H, W), as the student sees them: float32, with the source's mean and std."""
        return self._normalise(images.float() / 255)

    def _normalise(self, images: Tensor) -> Tensor:
        mean, std = self._mean_and_std(images)
        return (images - mean) / std

    def _mean_and_std(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the source's, of shape (3, 1, 1), as the images are held."""
        mean, std = (tuple(values) for values in (self.source.mean, self.source.std))
        return _by_channel(mean, images.device, images.dtype), _by_channel(std, images.device, images.dtype)

    def __str__(self) -> str:
        # Lightning's asks every loader for its size: printing would distil.
        return f"D4MDataModule({self.source.name}, train_on={self.train_on!r}, {self.recipe})"

    def to_unit_range(self, images: Tensor) -> Tensor:
        """Return normalised images, shape (B, 3, H, W), in [0, 1] again."""
        mean, std = self._mean_and_std(images)
        return images * std + mean

    def state_dict(self) -> dict[str, Any]:
        """Tell a checkpoint what its model was trained on, so that it can serve as a teacher."""
        return {
            "classes": list(self.source.classes),
            "mean": list(self.source.mean),
            "std": list(self.source.std),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare what a checkpoint's model was trained on with the source.

        Raises:
            InputError: where its classes are the source's in another order: each label would be another's.

        Warns:
            InputWarning: where they have other names, or images were normalised otherwise.
        """
        learnt, classes = list(state_dict["classes"]), list(self.source.classes)
        if learnt != classes and sorted(learnt) == sorted(classes):
            raise InputError(
                f"the checkpoint's model learnt the classes as {listed(learnt)}, and `source`, {self.source.name}, has "
                f"them as {listed(classes)}: another order; use images in folders, or labels, as those it learnt from."
            )
        compared: list[tuple[str, Any, Any]] = [("class", *both) for both in zip(learnt, classes, strict=False)]
        compared += [(name, state_dict[name], list(getattr(self.source, name))) for name in ("mean", "std")]
        if differs := [f"{what} {theirs!r} (here: {ours!r})" for what, theirs, ours in compared if theirs != ours]:
            rank_zero_warn(
                f"the checkpoint's model was trained on other data than {self.source.name}: {listed(differs)}.",
                category=InputWarning,
            )

    @cached_property
    def _held_training_set(self) -> Held | None:
        images, size = self.training_set, self.image_size
        if isinstance(images, DistilledDataset):
            return Held(images.squares(size, self.resize), torch.as_tensor(images.targets))
        if self.train_on == "real":
            return hold_squares(images, size)
        # As many as a distilled set are held in any case, as the squares that it would store.
        return hold(images, size, self.resize, self.num_workers)

    @cached_property
    def held_test_set(self) -> Held | None:
        """The test images in memory, as students see them; None where they are too many."""
        return hold_squares(self.source.test(), self.image_size)

    @property
    def _square(self) -> Callable[[Image.Image], Tensor]:
        return partial(to_pixels, size=self.image_size, resize=self.resize)  # which processes that read can be sent

    def _sampler(self, held: Held) -> Sampler[int]:
        if self.weighting == "uniform":
            return RandomSampler(held)
        weights = self.distilled.weights.double() ** POWERS[self.weighting]
        labels = torch.as_tensor(self.distilled.targets)
        of_class = torch.zeros(self.num_classes, dtype=torch.float64).index_add(0, labels, weights)
        return WeightedRandomSampler((weights / of_class[labels]).tolist(), len(held))


@cache  # each copy to an accelerator waits for it
def _by_channel(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # a training may follow a validation
        return torch.tensor(values, device=device, dtype=dtype).view(3, 1, 1)


def _check_goes_together(
    train_on: str,
    weighting: str,
    set_folder: str | Path | None,
    hub_id: str | None,
    revision: str | None,
    config_name: str | None,
    push: bool,
) -> None:
    """Refuse options of what is trained on that contradict each other, or are unknown."""
    if train_on not in ("distilled", "real", "random"):
        raise InputError(f"`train_on` is {train_on!r}; use distilled, real or random.")
    if push and (hub_id is None or train_on != "distilled" or set_folder or revision or config_name):
        raise InputError(
            "`push` is true; it needs `hub_id`, and `train_on: distilled`, and goes with none of `set_folder`, "
            "`revision` and `config_name`."
        )
    if hub_id and set_folder:
        raise InputError(f"`hub_id` is {hub_id!r} and `set_folder` {str(set_folder)!r}; name one set.")
    if revision and not hub_id:
        raise InputError(f"`revision` is {revision!r}, but no `hub_id` is named; only the Hub has revisions.")
    if config_name and not (hub_id or set_folder):
        raise InputError(f"`config_name` is {config_name!r}, but neither `set_folder` nor `hub_id` is named.")
    if weighting not in POWERS:
        raise InputError(f"`weighting` is {weighting!r}; use {', '.join(POWERS)}.")
    if weighting != "uniform" and train_on != "distilled":
        raise InputError(
            f"`weighting` is {weighting!r}, but `train_on` is {train_on!r}; only distilled images have weights."
        )


@contextmanager
def _ended_at_once() -> Iterator[None]:
    """Let SIGTERM end the process, where Lightning would wait for the next training step, and say what Ctrl-C keeps."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    lightnings = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    except KeyboardInterrupt:
        say("Stopped. What is distilled so far is kept: the same command goes on from there.")
        raise
    finally:
        signal.signal(signal.SIGTERM, lightnings or signal.SIG_DFL)  # None is of a program that Python runs in
