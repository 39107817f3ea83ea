"""Sets of the Hub in place of ones made here: of ours, the one that suits a recipe; of other tools, any."""

import dataclasses
import warnings
from collections.abc import Sequence

from PIL import Image

from d4m_plugin.distilled import DistilledDataset
from d4m_plugin.errors import InputError, InputWarning
from d4m_plugin.hub import Repository, find_repository, without_folders
from d4m_plugin.recipe import MODELS, Recipe
from d4m_plugin.sources import HuggingFace, Source
from d4m_plugin.sources.base import IndexedImages
from d4m_plugin.sources.names import match_classes

LONGEST_LABEL = 9  # digits of a class that is a label's number


class OthersSet:
    """A set that another tool distilled, as images with the source's labels."""

    def __init__(self, images: IndexedImages, label_of: list[int]) -> None:
        self.images = images
        self.targets = [label_of[label] for label in images.targets]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index][0], self.targets[index]


class _Whole(HuggingFace):
    """A set of the Hub, of whose own test split no use is made."""

    _tests_apart = False


def find_set(
    source: Source,
    recipe: Recipe,
    hub_id: str,
    config_name: str | None = None,
    revision: str | None = None,
    exact: bool = False,
) -> DistilledDataset | OthersSet | None:
    """Return the set of a Hub repository that suits a source and a recipe; None where it is there without that set.

    Args:
        source: the real images; the set's classes must be theirs.
        recipe: what was asked for: options that are not the defaults must be the set's, the others are the set's.
        hub_id: the repository, as user/name.
        config_name: which of its sets; by default the one of `ipc`, else the only one.
        revision: branch, tag or commit.
        exact: all of the recipe must be the set's, and a repository may be without sets.

    Raises:
        NotOnTheHub: where there is no such repository, or none that this user may see.
        InputError: where the Hub does not give the repository, or its set is not the one asked for.
    """
    repository = find_repository(hub_id, revision)
    if not repository.configs:
        return None if exact else _others(source, hub_id, config_name, revision)
    name = config_name or _config_of(repository, recipe, exact)
    if name is None:
        return None
    found = DistilledDataset(hub_id, name, repository.revision)
    differs = differences(found, source, recipe, exact)
    if found.classes != list(source.classes):
        differs.insert(0, f"the classes {listed(found.classes)} (asked for: {listed(source.classes)})")
    if differs:
        raise InputError(
            f"`hub_id` is {hub_id!r}, whose {name} is not the set asked for: it has {'; '.join(differs)}. Ask for what "
            "it has, or name another."
        )
    return found


def _config_of(repository: Repository, recipe: Recipe, exact: bool) -> str | None:
    if recipe.config_name in repository.configs:
        return recipe.config_name
    if exact or recipe.ipc != Recipe.ipc:
        return None
    if len(repository.configs) > 1:
        configs = ", ".join(repository.configs)
        raise InputError(f"`hub_id` is {repository.repo_id!r}, which holds {configs}; name one as `config_name`.")
    return repository.configs[0]


def differences(found: DistilledDataset, source: Source, recipe: Recipe, exact: bool = False) -> list[str]:
    """Return in words which options of a recipe, or only of those that are not the defaults, a set has otherwise."""
    differs = []
    asked = dataclasses.asdict(recipe.resolved(source))
    asked |= {name: without_folders(asked[name]) for name in MODELS}
    for field in dataclasses.fields(Recipe):
        told = exact or getattr(recipe, field.name) != field.default
        if told and found.recipe[field.name] != asked[field.name]:
            differs.append(f"{field.name} {found.recipe[field.name]!r} (asked for: {asked[field.name]!r})")
    return differs


def listed(names: Sequence[str]) -> str:
    """Return the first few of some names, for an error."""
    return ", ".join([*names[:3], "…"] if len(names) > 3 else names)


def _others(source: Source, hub_id: str, config_name: str | None, revision: str | None) -> OthersSet:
    images = _Whole(hub_id, config_name, revision, test_split="train")
    return OthersSet(images.train(), labels_of(images.classes, source, hub_id))


def labels_of(classes: Sequence[str], source: Source, name: str) -> list[int]:
    """Return the source's label of each class of a set that another tool distilled.

    Args:
        classes: the set's, in the order of its labels; numbers are taken as the source's labels.
        source: the real images.
        name: the set's.

    Raises:
        InputError: where a class is none of the source's.

    Warns:
        InputWarning: where they are numbers.
    """
    label_of, unknown = match_classes(classes, source.classes)
    labels = {name for name in classes if name.isdecimal() and len(name) <= LONGEST_LABEL}
    if unknown and labels == {*classes} and max(map(int, labels)) < len(source.classes):
        warnings.warn(
            InputWarning(f"the classes of {name} are numbers without names: taken as the labels of {source.name}."),
            stacklevel=2,
        )
        return [int(each) for each in classes]
    if unknown:
        raise InputError(
            f"{name} has the classes {listed(unknown)}, which are not among those of {source.name} "
            f"({listed(source.classes)}); name the `source` that it was distilled from."
        )
    return label_of
