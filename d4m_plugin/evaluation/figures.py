"""The figures of an evaluation."""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from d4m_plugin.lettering import OWN_FONT, font_for

MOST_CLASSES = 30  # that a figure can show each of
EXTREMES = 10  # classes at either end that are shown of more
MOST_PAIRS = 20  # of classes that are shown as confused, of more
MOST_COLOURS = 20  # classes that can be told apart in the t-SNE
MOST_POINTS = 2000  # of either kind in the t-SNE
OURS, OTHERS = "#d1495b", "#30638e"
PAIR = ((-0.2, "distilled", OURS), (0.2, "random", OTHERS))  # of bars: their shift, arm and colour

Features = tuple[Tensor, Tensor, Tensor, Tensor]  # of distilled images, (N, D), their labels, of real ones, theirs


def draw_all(results: dict[str, Any], folder: Path, features: Features | None) -> dict[str, str]:
    """Draw what the results hold, and return the caption of each file.

    Args:
        results: as `d4m evaluate` writes them.
        folder: where the files go.
        features: what a network sees in distilled and real images, and their labels.
    """
    from matplotlib import rc_context

    classes = results["set"]["classes"]
    fonts = [font_for(name) for name in classes]
    names = [name if font else f"class {label}" for label, (name, font) in enumerate(zip(classes, fonts, strict=True))]
    results = results | {"set": results["set"] | {"classes": names}}
    few = len(classes) <= MOST_CLASSES
    figures: dict[str, Callable[[dict[str, Any], Path], str]] = {"accuracy.png": accuracy}
    if all(_of_first(results, "accuracies", arm) for arm in ("distilled", "random")):  # or all of one diverged
        figures["classes.png"] = by_class if few else by_class_of_many
        if _of_first(results, "confusion", "distilled"):
            figures["confusion.png"] = confusion if few else confusion_of_many
    figures["losses.png"] = losses
    if features is not None:
        figures["tsne.png"] = partial(tsne, features=features)
    with rc_context({"font.family": list(dict.fromkeys([OWN_FONT, *(font.name for font in fonts if font)]))}):
        return {file: draw(results, folder / file) for file, draw in figures.items()}


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


def _told(results: dict[str, Any], what: str, **kind: str) -> list[Any]:
    """Return what the trainings of a kind tell; those that diverged tell no accuracies."""
    runs = [run for run in results["runs"] if all(run[name] == value for name, value in kind.items())]
    return [run[what] for run in runs if run[what] is not None]


def _of_first(results: dict[str, Any], what: str, arm: str) -> list[Any]:
    """Return what an arm's trainings tell, of the first student and kind of labels, as the figures of classes do."""
    first = results["table"][0]
    return _told(results, what, arm=arm, student=first["student"], labels=first["labels"])


def _title(results: dict[str, Any]) -> str:
    first = results["table"][0]
    return f"{first['student']}, {first['labels']} labels"


def _accuracies(results: dict[str, Any], arm: str) -> np.ndarray:
    """Return the accuracy of each class, %, the mean of the seeds; NaN of a class without test images."""
    means: np.ndarray = 100 * np.array(_of_first(results, "accuracies", arm), float).mean(0)
    return means


def _shares(results: dict[str, Any]) -> np.ndarray:
    """Return what the student of the distilled set names the images of each class (rows), %, all seeds together."""
    counts = np.sum(_of_first(results, "confusion", "distilled"), 0)
    shares: np.ndarray = 100 * counts / counts.sum(1, keepdims=True).clip(1)
    return shares


def by_class(results: dict[str, Any], path: Path) -> str:
    """Draw the accuracy of each class, of the distilled set and of random real images."""
    names = [_short(name) for name in results["set"]["classes"]]
    figure = new_figure(max(6, 0.6 * len(names)), 4)
    axis = figure.subplots()
    places = np.arange(len(names))
    for shift, arm, colour in PAIR:
        axis.bar(places + shift, _accuracies(results, arm), 0.4, color=colour, label=arm)
    axis.set_xticks(places, names, rotation=45 if len(names) > 6 else 0, ha="right" if len(names) > 6 else "center")
    axis.set(ylabel="accuracy, %", title=_title(results))
    figure.legend(loc="outside lower center", ncols=2, frameon=False)  # no bar is under it
    figure.savefig(path, dpi=120)
    return "Accuracy of each class, all seeds together."


def by_class_of_many(results: dict[str, Any], path: Path) -> str:
    """Draw the accuracies of all classes in order, and those of the classes in which the distilled set does worst."""
    names = [_short(name) for name in results["set"]["classes"]]
    figure = new_figure(6, 10)
    curves, bars = figure.subplots(2, height_ratios=[1, 2.5])
    order = np.argsort(_accuracies(results, "distilled"), stable=True)
    order = order[: np.isfinite(_accuracies(results, "distilled")).sum()]  # those without test images are last
    worst, best = order[:EXTREMES], order[EXTREMES:][-EXTREMES:]
    shown = [*worst, *best]
    places = np.array([*range(len(worst)), *range(EXTREMES + 1, EXTREMES + 1 + len(best))])  # a gap between the ends
    for shift, arm, colour in PAIR:
        accuracies = _accuracies(results, arm)
        curves.plot(np.arange(1, len(order) + 1), np.sort(accuracies[order]), color=colour, label=arm)
        bars.barh(places + shift, accuracies[shown], 0.4, color=colour)
    curves.set(xlabel="classes, from each arm's worst to its best", ylabel="accuracy, %")
    curves.set(title=_title(results))
    curves.grid(alpha=0.3)
    bars.set_yticks(places, [names[label] for label in shown])
    bars.set(xlabel="accuracy, %", title=f"The {EXTREMES} worst and the {EXTREMES} best of the distilled set")
    bars.invert_yaxis()
    bars.margins(y=0.01)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)
    return f"Accuracies of all {len(names):,} classes, and of those at either end, all seeds together."


def confusion_of_many(results: dict[str, Any], path: Path) -> str:
    """Draw the pairs of classes that the student of the distilled set takes for each other most often."""
    names = [_short(name) for name in results["set"]["classes"]]
    shares = _shares(results)
    np.fill_diagonal(shares, 0)
    worst = np.argsort(-shares, axis=None, stable=True)[:MOST_PAIRS]
    pairs = [(int(place) // len(names), int(place) % len(names)) for place in worst]
    figure = new_figure(6, 6)
    axis = figure.subplots()
    bars = axis.barh(range(len(pairs)), shares.flat[worst], color=OURS)
    axis.bar_label(bars, [f"{share:.0f}" for share in shares.flat[worst]], padding=4)
    axis.set_yticks(range(len(pairs)), [f"{names[true]} \N{RIGHTWARDS ARROW} {names[named]}" for true, named in pairs])
    axis.set(xlabel="% of the class", title=f"distilled: {_title(results)}")
    axis.invert_yaxis()
    axis.margins(x=0.1)
    figure.savefig(path, dpi=120)
    return "The pairs of classes that the student trained on the distilled set takes for each other most often."


def confusion(results: dict[str, Any], path: Path) -> str:
    """Draw what the student of the distilled set names the images of each class."""
    names = [_short(name) for name in results["set"]["classes"]]
    shares = _shares(results)
    edge = max(5, 0.45 * len(names))
    figure = new_figure(edge + 1, edge)
    axis = figure.subplots()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    axis.set_xticks(range(len(names)), names, rotation=90)
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="named", ylabel="true class", title=f"distilled: {_title(results)}")
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
            curves = _told(results, "losses", student=first, labels=labels, arm=arm)
            steps = [step for step, _ in curves[0]]
            means = np.array([[loss for _, loss in curve] for curve in curves], float).mean(0)  # NaN where one diverged
            ours = {"color": OURS, "linewidth": 2.5, "zorder": 3} if arm == "distilled" else {"color": next(others)}
            axis.plot(steps, means, label=arm, **ours)
        axis.set(xlabel="step", ylabel="loss", title=f"{first}, {labels} labels", yscale="log")
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return "Training loss, the mean over the seeds; losses of unlike labels cannot be compared."


def tsne(results: dict[str, Any], path: Path, features: Features) -> str:
    """Draw distilled images among real ones as the network sees them; of many classes, of some spread over all."""
    from matplotlib import colormaps
    from sklearn.manifold import TSNE

    names = results["set"]["classes"]
    shown = np.unique(np.linspace(0, len(names) - 1, MOST_COLOURS).astype(int))
    made, labels, real, real_labels = (some.numpy() for some in features)
    (made, colours), (real, real_colours) = (_of(made, labels, shown), _of(real, real_labels, shown))
    points = np.concatenate([made, real])
    points /= np.linalg.norm(points, axis=1, keepdims=True).clip(1e-12)
    perplexity = min(30, (len(points) - 1) / 3)
    placed = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(points)
    colour_of = colormaps["tab10" if len(shown) <= 10 else "tab20"]
    figure = new_figure(8, 6)
    axis = figure.subplots()
    ours, others = placed[: len(made)], placed[len(made) :]
    axis.scatter(*others.T, s=6, alpha=0.35, c=colour_of(real_colours), lw=0)
    axis.scatter(*ours.T, s=45, marker="^", c=colour_of(colours), edgecolors="k", lw=0.8)
    for colour, label in enumerate(shown):
        axis.scatter([], [], color=colour_of(colour), label=_short(names[label]))
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    network = _plain(results["pictures"]["network"])
    axis.set(xticks=[], yticks=[], title=f"t-SNE of the features of {network}")
    figure.savefig(path, dpi=120)
    of_which = f" {len(shown)} of the {len(names):,} classes," if len(shown) < len(names) else ""
    return f"Distilled images (outlined triangles) among real training images (dots),{of_which} coloured by class."


def _of(points: np.ndarray, labels: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the points of some classes, at most 2,000, and the place of each one's class among these."""
    chosen = np.flatnonzero(np.isin(labels, classes))
    chosen = chosen[_spread(len(chosen))]
    return points[chosen], np.searchsorted(classes, labels[chosen])


def _spread(count: int) -> np.ndarray:
    """Return places drawn from so many, in order, at most 2,000: even steps miss classes that come in turn."""
    return np.sort(np.random.default_rng(0).permutation(count)[:MOST_POINTS])


def _short(name: str) -> str:
    return _plain(name if len(name) <= 16 else f"{name[:15]}…")


def _plain(text: str) -> str:
    """Return text that matplotlib shows as it is: between two dollars it would read a formula, or fail to."""
    return text.replace("$", r"\$")
