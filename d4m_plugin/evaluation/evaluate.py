"""`d4m evaluate`: is a distilled set any good? It ends with an answer, whatever the answer is."""

import dataclasses
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d4m_plugin.assembling import versions
from d4m_plugin.cache import make_writable
from d4m_plugin.card import write_card
from d4m_plugin.devices import default_device
from d4m_plugin.errors import InputError, InputWarning
from d4m_plugin.evaluation.arms import Arm, Arms
from d4m_plugin.evaluation.figures import Features
from d4m_plugin.evaluation.pictures import features_of, judge, open_network, side_by_side
from d4m_plugin.evaluation.report import write_report
from d4m_plugin.evaluation.runs import Labels, Protocol, Row, Trainings, called, steps_of, trained
from d4m_plugin.evaluation.sets import JudgedSet, open_set
from d4m_plugin.evaluation.verdict import dd_ranking, sentences, table_of
from d4m_plugin.hub import without_folders
from d4m_plugin.preview import MAX_COLUMNS, MAX_ROWS, grid
from d4m_plugin.progress import is_first
from d4m_plugin.record import ResultsRecord, read_record, record_in_turn, write_record
from d4m_plugin.screening import readable_source
from d4m_plugin.seeding import seed_of
from d4m_plugin.sources import Source
from d4m_plugin.sources.images import read_image
from d4m_plugin.subsets import at_most
from d4m_plugin.teachers import load_teacher

REAL_SAMPLE = 5000  # real training images that the pictures are compared with


def evaluate(
    distilled_set: str,
    source: Source | None = None,
    output: Path | None = None,
    config_name: str | None = None,
    arms: tuple[Arm, ...] = ("distilled", "random", "real"),
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
    """Tell whether a distilled set is better than as many random real images, and how good its pictures are.

    The same students are trained in the same way on each arm's images, and measured on the real test images after the
    last step. What is done is kept: the same command goes on from there.

    Args:
        distilled_set: its folder; a dataset repository of the Hub, as user/name; or what another method made: a folder
            that has one of images for each class, or a .pt file of `images`, shape (N, 3, H, W), and `labels`.
        source: the real images that it was distilled from; scikit-learn's digits by default.
        output: the folder of the report; by default one in `evaluations`, named after the set.
        config_name: which of several sets.
        arms: what is trained on besides `distilled` and `random`: `equal_bytes` (as many random real images as take
            the bytes of the set on disk), `real` (all images), `herding` (real images that have, under the teacher, the
            mean of their class), `confident` (those that the teacher is surest of), `nearest` (those nearest to the
            prototypes), `decoded` (prototypes through the VAE alone), `generated` (without prototypes), `reconstructed`
            (random real ones through the VAE).
        labels: `teacher`, its softened outputs (Training-Time Matching), and `hard`, the images' own.
        students: `convnet`, or torchvision classifiers such as resnet18.
        seeds: trainings of each kind, from which the 95 % intervals come.
        budget: steps of each training: `quick` (500), `paper` (500 passes over the distilled set), or their number.
        batch_size: images a batch; no more than the set has.
        learning_rates: of several, each arm gets the one that is best on a slice of real training images.
        lr_smoothing: as ImageClassifier takes it: of 1, the paper's, the schedule ends at zero; of 2, at half the rate.
        teacher: as TeacherMatching takes it, but one, and not `stored`.
        features: the network by whose features the pictures are judged: `teacher`; `inception`, by which FID is
            published (needs torch-fidelity); or torchvision:NAME, timm:NAME or transformers:ID.
        diffusion: where the set's diffusion model lies, for the arms that need it, where it is a folder.
        compile: compile students and teacher with `torch.compile`: for long trainings.
        num_workers: processes that read images.
        skip_bad_images: leave out real images that cannot be read; by default they stop the work.
        cache_dir: as for D4MDataModule.

    Returns:
        What to tell the user.

    Raises:
        InputError: where an option cannot work, or the set is not of the source.
    """
    source = readable_source(source, skip_bad_images, cache_dir, num_workers)
    judged = open_set(distilled_set, source, config_name)
    folder = (output or Path("evaluations") / f"{judged.name}-{judged.fingerprint}").resolve()
    teacher = called(teacher, source)
    protocol = Protocol(
        arms=arms,
        labels=labels,
        students=students,
        seeds=seeds,
        steps=steps_of(budget, len(judged.squares), batch_size),
        batch_size=batch_size,
        learning_rates=learning_rates,
        lr_smoothing=lr_smoothing,
        teacher=teacher,
    )
    make_writable(folder, "output")
    network = network_of(features, protocol, source, judged, cache_dir)
    arms_of_set = Arms(judged, source, diffusion, None, folder / "arms", teacher, cache_dir, num_workers)
    trainings = Trainings(arms_of_set, protocol, folder / "runs", compile)
    runs = trained(trainings.of_seeds())
    if not is_first():
        return {}
    results = results_of(arms_of_set, trainings.protocol, runs, features, network, folder)
    _record(judged, results)
    caution = {"caution": judged.caution} if judged.caution else {}
    verdicts = {f"verdict {n + 1}": sentence for n, sentence in enumerate(results["verdicts"])}
    return caution | verdicts | {"report": folder / "report.html"}


def results_of(
    arms: Arms,
    protocol: Protocol,
    runs: Sequence[Row],
    features: str,
    network: nn.Module | None,
    folder: Path,
) -> dict[str, Any]:
    """Return what the trainings and a network, if there is one, say of a set, written to a folder as a report."""
    judged, source = arms.judged, arms.source
    amounts = {arm: arms.amount(arm, protocol.seeds) for arm in protocol.arms}
    table = table_of(runs, amounts, len(source.test()))
    made, labels = judged.squares.pixels, torch.tensor(judged.squares.targets)
    results: dict[str, Any] = {
        "set": {
            "name": judged.name,
            "source": source.name,
            "classes": list(source.classes),
            "ipc": [min(judged.counts), judged.ipc],
            "bytes": arms.bytes,
            "image_size": judged.image_size,
            "fingerprint": judged.fingerprint,
        },
        "protocol": dataclasses.asdict(protocol)
        | {"teacher": without_folders(protocol.teacher), "features": without_folders(features)},
        "versions": versions(),
        "device": default_device().type,
        "runs": runs,
        "table": table,
        "caution": judged.caution,
        "verdicts": sentences(table, len(source.test())),
        "ranking": dd_ranking(table, protocol.students[0]),
        "pictures": {},
    }
    first = [(labels == label).nonzero().flatten()[:MAX_COLUMNS] for label in range(min(len(source.classes), MAX_ROWS))]
    shown = [(made[some], name) for some, name in zip(first, source.classes, strict=False) if len(some)]
    pictures = {"The distilled images.": grid([row for row, _ in shown], [name for _, name in shown])}
    if judged.dataset:
        file = judged.dataset.folder / "prototypes.png"
        with suppress(InputError):  # it may be missing, cut off, or huge
            pictures["The prototypes, through the VAE alone."] = read_image(file, str(file))
    seen: Features | None = None
    if network is not None:
        real, real_labels = _sample(arms)
        of_source = features == "teacher"  # whose classes the teacher knows
        name = f"the teacher {without_folders(protocol.teacher)}" if of_source else without_folders(features)
        named = (labels, real_labels) if of_source else (None, None)
        figures = judge(network, name, made, named[0], real, named[1])
        results["pictures"] = figures.as_dict() | {"real_images": len(real)}
        beside = side_by_side(made, real, figures.nearest, figures.nearest_distance)
        pictures["The distilled images that are nearest to a real one, beside it, with their distance."] = beside
        seen = (figures.made_features, labels, figures.real_features, real_labels)
    write_report(results, folder, pictures, seen)
    return results


def network_of(
    features: str, protocol: Protocol, source: Source, judged: JudgedSet, cache_dir: Path | None
) -> nn.Module | None:
    """Return the network whose features judge the pictures; None of the teacher where hard labels do without one.

    Raises:
        InputError: where there is no such network, or it has no features.
    """
    try:
        network = load_teacher(protocol.teacher, source, cache_dir) if features == "teacher" else open_network(features)
    except InputError:
        if features != "teacher" or protocol.teacher != "auto" or "teacher" in protocol.labels:
            raise
        return None
    network.to(default_device()).eval()
    features_of(network, judged.squares.pixels[:1])  # before the long work
    return network


def _sample(arms: Arms) -> tuple[Tensor, Tensor]:
    """Return real training images, at most 5,000 of all classes together, as squares, and their labels."""
    source = arms.source
    chosen = at_most(source.train(), max(1, REAL_SAMPLE // len(source.classes)), seed_of(-2))  # no arm's draw
    return arms.squares_of(chosen), torch.as_tensor(chosen.targets, dtype=torch.int64)


def _record(judged: JudgedSet, results: dict[str, Any]) -> None:
    """Put the verdict in the record of a set of ours, and on its card."""
    dataset = judged.dataset
    if dataset is None or dataset.revision is not None:
        return
    told: Any = {name: results[name] for name in ResultsRecord.__annotations__}
    try:
        with record_in_turn(dataset.folder):
            metadata = read_record(dataset.folder)  # as it is now, hours after it was read
            metadata["results"] = told
            write_record(metadata, dataset.folder)
            write_card(Path(dataset.root), dataset.folder.name, metadata)
    except (OSError, InputError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        sentence = f"the results could not be put on the card of {str(dataset.root)!r} ({reason})."
        warnings.warn(sentence, InputWarning, stacklevel=2)
