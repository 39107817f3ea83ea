"""The commands of the command line that are functions, and what they tell the user when they are done."""

import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from d4m_plugin.distillation import BLOCK, distill
from d4m_plugin.distilled import DistilledDataset
from d4m_plugin.recipe import Recipe
from d4m_plugin.rehearsal import estimate
from d4m_plugin.screening import readable_source
from d4m_plugin.sources import Source


def distill_command(
    output: Path | None = None,
    source: Source | None = None,
    batch_size: int = BLOCK,
    num_workers: int = 0,
    cache_dir: Path | None = None,
    skip_bad_images: bool = False,
    keep_latents: bool = False,
    compile: bool = False,
    dry_run: bool = False,
    **recipe: Any,
) -> dict[str, Any]:
    """Distil a source: `distill` with the recipe's options one by one.

    Args:
        output: the folder to make; by default one in the cache, named after source and recipe.
        source: the real images; scikit-learn's digits by default.
        batch_size: images that the model takes at once; memory and speed depend on it, the set but by rounding. Halved
            where memory runs out.
        num_workers: processes that read real images.
        cache_dir: the cache; by default $D4M_CACHE, else d4m in $XDG_CACHE_HOME or ~/.cache.
        skip_bad_images: leave out images that cannot be read, and record which; by default they stop the work.
        keep_latents: keep what the VAE made of the real images in the cache, for other sets of the same source.
        compile: compile the model's denoiser with `torch.compile`: a minute or more first, less time for each image.
        dry_run: only say what it takes on this machine, by a short probe.
        recipe: options of the Recipe.
    """
    source = readable_source(source, skip_bad_images, cache_dir, num_workers)
    if dry_run:
        return estimate(source, Recipe(**recipe), batch_size, compile, num_workers, keep_latents)
    made = distill(
        source,
        Recipe(**recipe),
        output=output,
        cache_dir=cache_dir,
        batch_size=batch_size,
        num_workers=num_workers,
        keep_latents=keep_latents,
        compile=compile,
    )
    return {"distilled set": made.root, "preview": made.preview}


def push_command(
    folder: Path,
    hub_id: str,
    config_name: str | None = None,
    private: bool = False,
    tag: str | None = None,
    source_license: str | None = None,
    model_license: str | None = None,
) -> dict[str, Any]:
    """Upload a distilled set to the Hugging Face Hub, in one commit, and read it back.

    Other sets, and other people's files and text in the repository, stay.

    Args:
        folder: the set's.
        hub_id: the dataset repository, as user/name; made where it is not there.
        config_name: which of several sets in the folder.
        private: make it a private repository.
        tag: a name for the commit, such as `v1`.
        source_license: of the real images, by the Hub's name for it, where the set does not know it.
        model_license: of the diffusion model, likewise.

    Returns:
        What to tell the user.

    Raises:
        InputError: where the folder is no distilled set, or the Hub refuses; the set stays as it is.
    """
    from huggingface_hub import constants

    dataset = DistilledDataset(folder.resolve(), config_name)
    licenses = {"source_license": source_license, "model_license": model_license}
    commit = dataset.push_to_hub(hub_id, private=private, tag=tag, **licenses)
    return {
        "pushed to": f"{constants.ENDPOINT}/datasets/{hub_id}",
        "revision": commit,
        "by anyone": f'load_dataset("{hub_id}", "{dataset.folder.name}", split="train")',
    }


FUNCTIONS = {
    "preview": "rehearsal:preview",
    "distill": "commands:distill_command",
    "evaluate": "evaluation.evaluate:evaluate",
    "compare": "evaluation.compare:compare",
    "sweep": "evaluation.sweep:sweep",
    "relabel": "relabelling:relabel",
    "push": "commands:push_command",
    "pretrain": "pretraining:pretrain",
    "cache": "housekeeping:cache",
}
# Whose required options are given without their names.
POSITIONAL = ("cache", "compare", "evaluate", "push", "relabel")
MANY = {"compare": 0, "cache": 1}  # of them, those that take any number of words, after so many single ones
SHARED = ("compare", "distill", "evaluate", "sweep")  # by the processes of all devices


def function_of(command: str) -> Callable[..., Any]:
    """Return the function of a command, importing what it needs and no more."""
    function: Callable[..., Any] = pkgutil.resolve_name(f"d4m_plugin.{FUNCTIONS[command]}")
    return function


def rows_of(made: Any) -> dict[str, Any]:
    """Return the names and values of the table that a command ends with, from what its function returned."""
    if isinstance(made, dict):
        return made
    if isinstance(made, Path):
        return {"pipeline": made}
    teacher = "{teacher}: {tried}".format(**made.metadata["labels"])
    return {"distilled set": made.root, "preview": made.preview, "teacher": teacher}
