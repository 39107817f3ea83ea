"""`d4m sweep`: how the student's accuracy depends on an option of the recipe, as in the paper's supplement."""

import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import ttest_ind_from_stats
from torch import Tensor

from d4m_plugin.cache import make_writable
from d4m_plugin.checking import check_above_zero, check_least
from d4m_plugin.devices import default_device
from d4m_plugin.distillation import BLOCK, distill
from d4m_plugin.distilled import DistilledDataset
from d4m_plugin.errors import InputError
from d4m_plugin.evaluation.arms import Arms
from d4m_plugin.evaluation.figures import new_figure
from d4m_plugin.evaluation.report import write_csv
from d4m_plugin.evaluation.runs import Labels, Protocol, Row, Training, Trainings, called, steps_of, trained
from d4m_plugin.evaluation.sets import ours
from d4m_plugin.evaluation.verdict import gain_of, interval, points_of
from d4m_plugin.models.students import create_student
from d4m_plugin.preview import grid
from d4m_plugin.progress import is_first
from d4m_plugin.recipe import Recipe
from d4m_plugin.screening import readable_source
from d4m_plugin.sources import Source
from d4m_plugin.subsets import random_subset
from d4m_plugin.teachers import tried_teacher

Setting = dict[str, Any]  # the options that differ, by name
SHOWN = 10  # images of a setting, in the picture


def sweep(
    source: Source | None = None,
    output: Path = Path("sweep"),
    strength: tuple[float, ...] = (),
    guidance_scale: tuple[float, ...] = (),
    prototypes: tuple[int, ...] = (),
    num_inference_steps: tuple[int, ...] = (),
    mode_guidance_scale: tuple[float, ...] = (),
    oversample: tuple[int, ...] = (),
    ipc: int = 10,
    recipe: dict[str, Any] | None = None,
    labels: tuple[Labels, ...] = ("teacher", "hard"),
    student: str = "convnet",
    seeds: int = 3,
    budget: str | int = "quick",
    batch_size: int = 100,
    lr: float = 1e-3,
    teacher: str = "auto",
    distill_batch_size: int = BLOCK,
    compile: bool = False,
    num_workers: int = 0,
    skip_bad_images: bool = False,
    cache_dir: Path | None = None,
) -> dict[str, Any]:
    """Distil under each of some settings, train on each set, and draw how the accuracy depends on them.

    A seed decides a set and the training on it, so the intervals are of both. The real images are encoded once (for
    each seed, where `max_images_per_class` draws some), and kept in the cache (64 kB an image at 512 pixels); sets and
    trainings that are done are not made again.

    Args:
        source: the real images; scikit-learn's digits by default.
        output: the folder of the figures.
        strength: values to try; of several options that are given, all combinations.
        guidance_scale: values to try.
        prototypes: values to try, divisors of `ipc`.
        num_inference_steps: values to try.
        mode_guidance_scale: values to try.
        oversample: values to try; `teacher` chooses.
        ipc: images per class.
        recipe: other options of the Recipe, the same for all.
        labels: `teacher` and `hard`.
        student: whose accuracy.
        seeds: sets and trainings of each setting.
        budget: steps of each training, as for `d4m evaluate`.
        batch_size: images a batch.
        lr: the first learning rate.
        teacher: as TeacherMatching takes it, but one, and not `stored`.
        distill_batch_size: images that the diffusion model takes at once.
        compile: compile student and teacher.
        num_workers: processes that read images.
        skip_bad_images: leave out real images that cannot be read; by default they stop the work.
        cache_dir: as for D4MDataModule.

    Returns:
        What to tell the user.

    Raises:
        InputError: where an option cannot work, no option has values, or a training diverges.
    """
    check_least(1, seeds=seeds, batch_size=batch_size, distill_batch_size=distill_batch_size)
    check_above_zero(lr=lr)
    source = readable_source(source, skip_bad_images, cache_dir, num_workers)
    teacher = called(teacher, source)
    given: dict[str, Sequence[Any]] = {
        "strength": strength,
        "guidance_scale": guidance_scale,
        "prototypes": prototypes,
        "num_inference_steps": num_inference_steps,
        "mode_guidance_scale": mode_guidance_scale,
        "oversample": oversample,
    }
    varied = {name: values for name, values in given.items() if values}
    if not varied:
        raise InputError(f"nothing is varied; give values of {', '.join(f'`{name}`' for name in given)}.")
    known = {field.name for field in dataclasses.fields(Recipe)} - {"seed", "ipc", *varied}
    if unknown := [name for name in recipe or {} if name not in known]:
        raise InputError(f"`recipe` has {unknown[0]!r}; it takes other options of the Recipe than those given here.")
    settings: list[Setting] = [dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())]
    recipes = [_recipe_of({"ipc": ipc, **(recipe or {}), **setting}, teacher) for setting in settings]
    protocol = Protocol(
        arms=(),
        labels=labels,
        students=(student,),
        seeds=1,
        steps=steps_of(budget, ipc * len(source.classes), batch_size),
        batch_size=batch_size,
        learning_rates=(lr,),
        teacher=teacher,
    )
    make_writable(output.resolve(), "output")
    create_student(student, len(source.classes), recipes[0].resolved(source).image_size)  # whether it can be made
    if "teacher" in labels:
        tried_teacher(teacher, source, cache_dir, default_device())
    random_subset(source, ipc, seed=0)  # whether there are as many
    samples: list[Tensor] = []
    found: list[tuple[int, Row]] = []  # each with the number of its setting
    for seed in range(seeds):
        trainings: list[tuple[int, Training]] = []  # likewise
        for number, each in enumerate(recipes):
            made = distill(
                source,
                dataclasses.replace(each, seed=seed),
                cache_dir=cache_dir,
                batch_size=distill_batch_size,
                num_workers=num_workers,
                keep_latents=True,
            )
            if seed == 0:
                samples.append(_first_images(made))
            arms = Arms(ours(made, source), source, teacher=teacher, cache_dir=cache_dir, num_workers=num_workers)
            of_set = Trainings(arms, protocol, output / "runs", compile)
            trainings += [(number, training) for training in of_set.of_seeds([seed])]
        runs = trained([training for _, training in trainings])
        for run in runs:
            if run["accuracy"] is None:
                raise InputError(
                    f"`lr` is {lr:g}, under which a training diverged ({run['arm']}, {run['labels']} labels, seed "
                    f"{seed}); lower it."
                )
        found += zip([number for number, _ in trainings], runs, strict=True)
    if not is_first():
        return {}
    rows = _rows_of(found, settings, len(source.test()))
    write_csv(output / "sweep.csv", rows)
    _draw(rows, list(varied), source.name, output / "sweep.png")
    named = [", ".join(f"{value:g}" for value in setting.values()) for setting in settings]
    grid(samples, named).save(output / "samples.png")
    lines = {_named(row, varied) + f", {row['labels']} labels": _shown(row) for row in rows}
    return lines | {"figures": output.resolve() / "sweep.png", "samples": output.resolve() / "samples.png"}


def _recipe_of(options: dict[str, Any], teacher: str) -> Recipe:
    """Return a setting's recipe; where nobody else is named to choose among tries, the teacher does."""
    chooser = {"teacher": teacher} if options.get("oversample", 1) > 1 else {}
    return Recipe(**chooser | options)


def _rows_of(found: Sequence[tuple[int, Row]], settings: Sequence[Setting], test_images: int) -> list[dict[str, Any]]:
    """Return a row for each setting and kind of labels, from trainings of which none diverged, seed by seed."""
    accuracies: dict[tuple[int, Labels], list[float]] = {}
    of_random: dict[Labels, list[float]] = {}  # of the first setting, as they are the same of all
    for number, run in found:
        assert run["accuracy"] is not None
        if run["arm"] == "distilled":
            accuracies.setdefault((number, run["labels"]), []).append(run["accuracy"])
        elif number == 0:
            of_random.setdefault(run["labels"], []).append(run["accuracy"])
    return [
        settings[number] | {"labels": kind} | setting_row(own, accuracies[0, kind], of_random[kind], test_images)
        for (number, kind), own in accuracies.items()
    ]


def setting_row(found: list[float], of_first: list[float], of_random: list[float], test_images: int) -> dict[str, Any]:
    """Return what a setting's accuracies, of each seed in order, say.

    Returns:
        The mean `accuracy` and its 95 % `interval`; the mean of `random` real images, and the gain over them and over
        the first setting, paired by seed, with 95 % intervals; `p_against_first`, of the independent t-test as in the
        paper's supplement, None where neither's accuracies differ among its seeds; how many `seeds`.
    """
    over_random = gain_of(list(zip(found, of_random, strict=True)), test_images)
    over_first: tuple[float | None, float | None] = (None, None)
    p = None
    if found is not of_first:
        over_first = gain_of(list(zip(found, of_first, strict=True)), test_images)
        if len(found) > 1 and any(map(statistics.stdev, (found, of_first))):
            both = [(statistics.mean(each), statistics.stdev(each), len(each)) for each in (found, of_first)]
            p = float(ttest_ind_from_stats(*both[0], *both[1]).pvalue)
    return {
        "accuracy": statistics.mean(found),
        "interval": interval(found),
        "random": statistics.mean(of_random),
        "against_random": over_random[0],
        "against_random_interval": over_random[1],
        "against_first": over_first[0],
        "against_first_interval": over_first[1],
        "p_against_first": p,
        "seeds": len(found),
    }


def _named(row: dict[str, Any], varied: Sequence[str] | dict[str, Any]) -> str:
    return ", ".join(f"{name} {row[name]}" for name in varied)


def _shown(row: dict[str, Any]) -> str:
    spread = "" if row["interval"] is None else f" ± {100 * row['interval']:.1f}"
    over = {"random real images": "against_random", "the first": "against_first"}
    gains = [
        f"{points_of(row[name], row[f'{name}_interval'])} over {others}"
        for others, name in over.items()
        if row[name] is not None
    ]
    return f"{100 * row['accuracy']:.1f}{spread} % ({', '.join(gains)})"


def _draw(rows: Sequence[dict[str, Any]], varied: Sequence[str], source: str, path: Path) -> None:
    """Draw the accuracies against the first option, a line for each value of the others, a panel for each labels."""
    kinds = list(dict.fromkeys(row["labels"] for row in rows))
    figure = new_figure(5 * len(kinds), 4)
    axes = figure.subplots(1, len(kinds), squeeze=False)[0]
    first, *others = varied
    for axis, kind in zip(axes, kinds, strict=True):
        lines: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["labels"] == kind:
                lines.setdefault(_named(row, others), []).append(row)
        for name, line in lines.items():
            line.sort(key=lambda row: row[first])  # whatever the order they were given in
            values, means = [row[first] for row in line], [100 * row["accuracy"] for row in line]
            errors = [100 * (row["interval"] or 0) for row in line]
            axis.errorbar(values, means, errors, marker="o", capsize=3, label=name or "distilled")
        level = 100 * next(row["random"] for row in rows if row["labels"] == kind)
        axis.axhline(level, color="grey", linestyle="--", label="random real images")
        axis.set(xlabel=first, ylabel="accuracy on real test images, %", title=f"{source}, {kind} labels")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


def _first_images(made: DistilledDataset) -> Tensor:
    """Return the first image of each of the first classes, uint8, shape (at most 10, 3, H, W)."""
    return torch.stack([made.images[made.targets.index(label)] for label in range(min(SHOWN, len(made.classes)))])
