"""`d4m compare`: several sets of one source, of whatever methods, under one protocol."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d4m_plugin.cache import make_writable
from d4m_plugin.card import accuracy
from d4m_plugin.errors import InputError
from d4m_plugin.evaluation.arms import Arm, Arms
from d4m_plugin.evaluation.evaluate import network_of, results_of
from d4m_plugin.evaluation.report import write_csv
from d4m_plugin.evaluation.runs import Labels, Protocol, Trainings, called, steps_of, trained
from d4m_plugin.evaluation.sets import open_set
from d4m_plugin.evaluation.verdict import points_of
from d4m_plugin.progress import is_first
from d4m_plugin.screening import readable_source
from d4m_plugin.sources import Source


def compare(
    distilled_sets: list[str],
    source: Source | None = None,
    output: Path = Path("comparison"),
    arms: tuple[Arm, ...] = ("distilled", "random"),
    labels: tuple[Labels, ...] = ("teacher", "hard"),
    students: tuple[str, ...] = ("convnet",),
    seeds: int = 3,
    budget: str | int = "quick",
    batch_size: int = 100,
    learning_rates: tuple[float, ...] = (1e-3,),
    lr_smoothing: float = 1.0,
    teacher: str = "auto",
    features: str = "teacher",
    diffusion: str | None = None,
    compile: bool = False,
    num_workers: int = 0,
    skip_bad_images: bool = False,
    cache_dir: Path | None = None,
) -> dict[str, Any]:
    """Judge several distilled sets of one source alike, whoever made them, each against as many random real images.

    Args:
        distilled_sets: each as for `d4m evaluate`: ours, a repository of the Hub, a folder of images by class, or a .pt
            file.
        source: the real images; scikit-learn's digits by default.
        output: the folder of the table and of a report for each set.
        arms: what is trained on besides `distilled` and `random`.
        labels: `teacher` and `hard`.
        students: `convnet`, or torchvision classifiers such as resnet18.
        seeds: trainings of each kind.
        budget: steps of each training, as for `d4m evaluate`, the same for all: with `paper`, of the largest set.
        batch_size: images a batch; no more than a set has.
        learning_rates: of several, each arm gets the one that is best on a slice of real training images.
        lr_smoothing: as ImageClassifier takes it: of 1, the paper's, the schedule ends at zero; of 2, at half the rate.
        teacher: as TeacherMatching takes it, but one, and not `stored`.
        features: the network by whose features the pictures are judged, as for `d4m evaluate`.
        diffusion: where the sets' diffusion model lies, for the arms that need it, where it is a folder.
        compile: compile students and teacher.
        num_workers: processes that read images.
        skip_bad_images: leave out real images that cannot be read; by default they stop the work.
        cache_dir: as for D4MDataModule.

    Returns:
        What to tell the user.

    Raises:
        InputError: where an option cannot work, or a set is not of the source.
    """
    if len(distilled_sets) < 2:
        raise InputError(f"`distilled_sets` has {len(distilled_sets)}; name at least two, or use `d4m evaluate`.")
    source = readable_source(source, skip_bad_images, cache_dir, num_workers)
    sets = [open_set(name, source) for name in distilled_sets]
    ways = {(each.image_size, each.resize) for each in sets}
    if len(ways) > 1:
        told = " and ".join(f"{size} pixels ({resize})" for size, resize in sorted(ways))
        raise InputError(f"`distilled_sets` has sets of {told}; only sets of one size can be compared.")
    teacher = called(teacher, source)
    protocol = Protocol(
        arms=arms,
        labels=labels,
        students=students,
        seeds=seeds,
        steps=steps_of(budget, max(len(each.squares) for each in sets), batch_size),
        batch_size=batch_size,
        learning_rates=learning_rates,
        lr_smoothing=lr_smoothing,
        teacher=teacher,
    )
    make_writable(output.resolve(), "output")
    network = network_of(features, protocol, source, sets[0], cache_dir)
    shared = (source, diffusion, None, output / "arms", teacher, cache_dir, num_workers)
    arms_of_sets = [Arms(each, *shared) for each in sets]
    # All are checked before one is trained on.
    of_sets = [Trainings(each, protocol, output / "runs", compile) for each in arms_of_sets]
    trainings = [each.of_seeds() for each in of_sets]
    runs = trained(list(itertools.chain(*trainings)))
    if not is_first():
        return {}
    rows: list[dict[str, Any]] = []
    for number, (each, arms_of_set) in enumerate(zip(sets, arms_of_sets, strict=True)):
        of_set, runs = runs[: len(trainings[number])], runs[len(trainings[number]) :]
        folder = output / f"{number + 1}-{each.name}"
        folder.mkdir(exist_ok=True)
        results = results_of(arms_of_set, of_sets[number].protocol, of_set, features, network, folder)
        rows += _rows(f"{number + 1} {each.name}", results["table"])
    write_csv(output / "comparison.csv", rows)
    return {f"{row['set']}, {row['student']}, {row['labels']}": _shown(row) for row in rows} | {
        "table": output.resolve() / "comparison.csv",
        "reports": output.resolve(),
    }


def _rows(name: str, table: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each student and kind of labels: the set's accuracies, and what random real images reach."""
    of_random = {(row["student"], row["labels"]): row for row in table if row["arm"] == "random"}
    rows = []
    for own in (row for row in table if row["arm"] == "distilled"):
        other = of_random[own["student"], own["labels"]]
        row = {"set": name} | {
            column: own[column] for column in ("images", "student", "labels", "mean", "std", "diverged")
        }
        against = {column: other[column] for column in ("difference", "interval", "verdict")}
        rows.append(row | {"random": other["mean"]} | against)
    return rows


def _shown(row: dict[str, Any]) -> str:
    if row["verdict"] == "diverged":
        return f"{accuracy(row)}; not compared, since trainings diverged: lower `learning_rates`"
    points = points_of(row["difference"], row["interval"])
    return f"{accuracy(row)} %; against {row['images']} random real images {points}, {row['verdict'] or 'one seed'}"
