"""The figures of an evaluation."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

MOST_CLASSES = 30  # that a figure by class can show
MOST_COLOURS = 20  # of classes that can be told apart in the t-SNE
MOST_POINTS = 2000  # of either kind in the t-SNE
OURS, OTHERS = "#d1495b", "#30638e"

Features = tuple[Tensor, Tensor, Tensor, Tensor]  # of distilled images, (N, D), their labels, of real ones, theirs


def draw_all(results: dict[str, Any], folder: Path, features: Features | None) -> dict[str, str]:
    """Draw what the results hold, and return the caption of each file.

    Args:
        results: as `d4m evaluate` writes them.
        folder: where the files go.
        features: what a network sees in distilled and real images, and their labels.
    """
    drawn = {"accuracy.png": accuracy(results, folder / "accuracy.png")}
    classes = len(results["set"]["classes"])
    diverged = any(row["mean"] is None for row in results["table"][:2])  # distilled and random of the first student
    if classes <= MOST_CLASSES and not diverged:
        drawn["classes.png"] = by_class(results, folder / "classes.png")
        drawn["confusion.png"] = confusion(results, folder / "confusion.png")
    drawn["losses.png"] = losses(results, folder / "losses.png")
    if features is not None:
        drawn["tsne.png"] = tsne(results, features, folder / "tsne.png")
    return drawn


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib Figure of a size in inches."""
    from matplotlib.figure import Figure  # not pyplot, which has a global state and may want a display

    return Figure(figsize=(width, height), layout="constrained")


def accuracy(results: dict[str, Any], path: Path) -> str:
    """Draw the mean accuracy of each arm, a panel for each kind of labels and student, the distilled set in red."""
    table = results["table"]
    panels = list(dict.fromkeys((row["student"], row["labels"]) for row in table))
    one_seed = results["protocol"]["seeds"] == 1
    figure = new_figure(6, (1 + 0.4 * len(results["protocol"]["arms"])) * len(panels))  # one column, for phones
    axes = figure.subplots(len(panels), squeeze=False, sharex=True).flat
    for axis, (student, labels) in zip(axes, panels, strict=True):
        rows = [row for row in table if (row["student"], row["labels"]) == (student, labels)][::-1]
        means = [100 * (row["mean"] or 0) for row in rows]
        errors = None if one_seed else [100 * (row["std"] or 0) for row in rows]
        named = ["diverged" if row["mean"] is None else f"{100 * row['mean']:.1f}" for row in rows]
        colours = [OURS if row["arm"] == "distilled" else OTHERS for row in rows]
        bars = axis.barh([row["arm"] for row in rows], means, xerr=errors, color=colours, capsize=3)
        axis.bar_label(bars, named, padding=4)
        axis.set(title=f"{student}, {labels} labels")
        axis.margins(x=0.15)
    axes[-1].set(xlabel="accuracy on real test images, %")
    figure.savefig(path, dpi=120)
    if one_seed:
        return "Accuracy of each arm, with one seed."
    return "Mean accuracy of each arm; the bars are one standard deviation over the seeds."


def _of_classes(results: dict[str, Any], arm: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Return an arm's confusion, summed over the seeds of the first student and kind of labels."""
    first = results["table"][0]
    runs = [run for run in results["runs"] if all(run[name] == first[name] for name in ("student", "labels"))]
    kept = [run["confusion"] for run in runs if run["arm"] == arm and run["confusion"] is not None]
    return np.sum(kept, 0), first


def by_class(results: dict[str, Any], path: Path) -> str:
    """Draw the accuracy of each class, of the distilled set and of random real images."""
    names = [_short(name) for name in results["set"]["classes"]]
    figure = new_figure(max(6, 0.6 * len(names)), 4)
    axis = figure.subplots()
    places = np.arange(len(names))
    for shift, arm, colour in ((-0.2, "distilled", OURS), (0.2, "random", OTHERS)):
        counts, first = _of_classes(results, arm)
        axis.bar(places + shift, 100 * counts.diagonal() / counts.sum(1).clip(1), 0.4, color=colour, label=arm)
    axis.set_xticks(places, names, rotation=45 if len(names) > 6 else 0, ha="right" if len(names) > 6 else "center")
    axis.set(ylabel="accuracy, %", title=f"{first['student']}, {first['labels']} labels")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)  # no bar is under it
    figure.savefig(path, dpi=120)
    return "Accuracy of each class, all seeds together."


def confusion(results: dict[str, Any], path: Path) -> str:
    """Draw what the student of the distilled set names the images of each class."""
    names = [_short(name) for name in results["set"]["classes"]]
    counts, first = _of_classes(results, "distilled")
    shares = 100 * counts / counts.sum(1, keepdims=True).clip(1)
    edge = max(5, 0.45 * len(names))
    figure = new_figure(edge + 1, edge)
    axis = figure.subplots()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    axis.set_xticks(range(len(names)), names, rotation=90)
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="named", ylabel="true class", title=f"distilled: {first['student']}, {first['labels']} labels")
    for (row, column), share in np.ndenumerate(shares):
        if share >= 1:
            axis.text(column, row, f"{share:.0f}", ha="center", va="center", color="w" if share > 50 else "k", size=8)
    figure.colorbar(image, label="% of the class", shrink=0.8)
    figure.savefig(path, dpi=120)
    return "What the student trained on the distilled set names the images of each class, in percent."


def losses(results: dict[str, Any], path: Path) -> str:
    """Draw the training loss of each arm, the mean of its seeds, a panel for each kind of labels."""
    first = results["table"][0]["student"]
    kinds = results["protocol"]["labels"]
    figure = new_figure(6, 3.5 * len(kinds))
    for axis, labels in zip(figure.subplots(len(kinds), squeeze=False).flat, kinds, strict=True):
        others = itertools.cycle(["#30638e", "#edae49", "#3d9970", "#8e6c8a", "#7f7f7f", "#17becf"])
        for arm in results["protocol"]["arms"]:
            key = {"student": first, "labels": labels, "arm": arm}
            curves = [run["losses"] for run in results["runs"] if all(run[name] == key[name] for name in key)]
            steps = [step for step, _ in curves[0]]
            means = np.array([[loss for _, loss in curve] for curve in curves], float).mean(0)  # NaN where one diverged
            ours = {"color": OURS, "linewidth": 2.5, "zorder": 3} if arm == "distilled" else {"color": next(others)}
            axis.plot(steps, means, label=arm, **ours)
        axis.set(xlabel="step", ylabel="loss", title=f"{first}, {labels} labels", yscale="log")
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return "Training loss, the mean over the seeds; losses of unlike labels cannot be compared."


def tsne(results: dict[str, Any], features: Features, path: Path) -> str:
    """Draw distilled images among real ones as the network sees them."""
    from sklearn.manifold import TSNE

    made, labels, real, real_labels = (some.numpy()[_spread(len(some))] for some in features)
    points = np.concatenate([made, real])
    points /= np.linalg.norm(points, axis=1, keepdims=True).clip(1e-12)
    perplexity = min(30, (len(points) - 1) / 3)
    placed = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(points)
    names = results["set"]["classes"]
    colours = _colours(len(names))
    figure = new_figure(8, 6)
    axis = figure.subplots()
    ours, others = placed[: len(made)], placed[len(made) :]
    axis.scatter(*others.T, s=6, alpha=0.35, c=[colours(label) for label in real_labels.tolist()], lw=0)
    axis.scatter(*ours.T, s=45, marker="^", c=[colours(label) for label in labels.tolist()], edgecolors="k", lw=0.8)
    if len(names) <= MOST_COLOURS:
        for label, name in enumerate(names):
            axis.scatter([], [], color=colours(label), label=_short(name))
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    network = _plain(results["pictures"]["network"])
    axis.set(xticks=[], yticks=[], title=f"t-SNE of the features of the teacher {network}")
    figure.savefig(path, dpi=120)
    return "Distilled images (outlined triangles) among real training images (dots), coloured by class."


def _spread(count: int) -> np.ndarray:
    """Return places drawn from so many, in order, at most 2,000: even steps miss classes that come in turn."""
    return np.sort(np.random.default_rng(0).permutation(count)[:MOST_POINTS])


def _colours(count: int) -> Callable[[int], Any]:
    from matplotlib import colormaps

    map_ = colormaps["tab10" if count <= 10 else "tab20" if count <= MOST_COLOURS else "hsv"]
    return lambda label: map_(label) if count <= MOST_COLOURS else map_(label / count)


def _short(name: str) -> str:
    return _plain(name if len(name) <= 16 else f"{name[:15]}…")


def _plain(text: str) -> str:
    """Return text that matplotlib shows as it is: between two dollars it would read a formula, or fail to."""
    return text.replace("$", r"\$")
