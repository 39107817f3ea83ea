"""What the accuracies say: is the distilled set better than another arm, or can that not be told?"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from scipy.stats import t as student_t

from d4m_plugin.evaluation.arms import Arm
from d4m_plugin.evaluation.runs import Labels, Row

Verdict = Literal["better", "worse", "not separable", "diverged"]
CONFIDENCE = 0.95
LEAST_IMAGES = 6  # fewer test images that all fall one way are not told from chance by a sign test: 2 / 2**6 < 0.05
ROUNDING = 0.5  # of an image, since an accuracy's mean over seeds is of no whole number of them

AGAINST: dict[Arm, str] = {"random": "as many random real images", "equal_bytes": "random real images in as many bytes"}
LABELS: dict[Labels, str] = {"teacher": "the teacher's labels", "hard": "hard labels"}


def interval(values: Sequence[float], resolution: float = 0.0) -> float | None:
    """Return half the width of the 95 % interval of a mean, by Student's t; None of fewer than two values.

    Args:
        values: one of each seed.
        resolution: what values cannot tell apart, such as one test image: a few seeds that happen to agree do not make
            an interval narrower than that.
    """
    if len(values) < 2:
        return None
    quantile = float(student_t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return max(resolution, quantile * statistics.stdev(values) / math.sqrt(len(values)))


def gain_of(pairs: Sequence[tuple[float, float]], test_images: int) -> tuple[float, float | None]:
    """Return the mean by which the first accuracies are above the second, and half of its 95 % interval.

    Args:
        pairs: two accuracies of each seed.
        test_images: how many they are measured on; no interval is finer than one.
    """
    gains = [mine - other for mine, other in pairs]
    return statistics.mean(gains), interval(gains, 1 / test_images)


def verdict_of(difference: float, half_width: float, test_images: int) -> Verdict:
    """Return what a difference and its interval say: nothing, where the interval holds zero or few images decide."""
    least = max(half_width, (LEAST_IMAGES - ROUNDING) / test_images)
    if math.isclose(abs(difference), least) or abs(difference) < least:
        return "not separable"
    return "better" if difference > 0 else "worse"


def table_of(
    runs: Sequence[Row], amounts: Mapping[Arm, dict[str, int | None]], test_images: int
) -> list[dict[str, Any]]:
    """Return a row for each student, kind of labels and arm, its accuracies against the distilled set's.

    Args:
        runs: as `trained` returns them.
        amounts: how many `images` each arm has, and `bytes`, as `Arms.amount` returns them.
        test_images: how many the accuracies are measured on.

    Returns:
        Rows of `student`, `labels`, `arm`, `images`, `bytes`, `mean` and `std` of the accuracies (shares), `seeds`, and
        the seeds that `diverged`, which are in none of these; of the other arms, `difference` (distilled minus theirs,
        paired by seed), `interval` (half of the 95 % one) and `verdict` on the distilled set; None where they cannot be
        told, as where a training of either diverged.
    """
    cells: dict[tuple[str, Labels, Arm], dict[int, float | None]] = {}
    for run in runs:
        cells.setdefault((run["student"], run["labels"], run["arm"]), {})[run["seed"]] = run["accuracy"]
    rows = []
    for (student, labels, arm), found in cells.items():
        row: dict[str, Any] = {"student": student, "labels": labels, "arm": arm, **amounts[arm]}
        values = [accuracy for accuracy in found.values() if accuracy is not None]
        row |= {"mean": statistics.mean(values) if values else None}
        row |= {"std": statistics.stdev(values) if len(values) > 1 else None, "seeds": len(values)}
        row |= {"diverged": [seed for seed, accuracy in found.items() if accuracy is None]}
        row |= {"difference": None, "interval": None, "verdict": None}
        if arm != "distilled":
            ours = cells[student, labels, "distilled"]
            pairs = [(ours[seed], accuracy) for seed, accuracy in found.items()]
            told = [(mine, other) for mine, other in pairs if mine is not None and other is not None]
            if len(told) < len(pairs):
                row["verdict"] = "diverged"
            else:
                row["difference"], row["interval"] = gain_of(told, test_images)
                if row["interval"] is not None:
                    row["verdict"] = verdict_of(row["difference"], row["interval"], test_images)
        rows.append(row)
    return rows


def sentences(table: Sequence[dict[str, Any]], test_images: int) -> dict[str, Verdict | None]:
    """Return the verdicts against random real images by the words for them, the unfavourable ones first."""
    order = ["diverged", "worse", "not separable", None, "better"]
    against = [row for row in table if row["arm"] in AGAINST]
    in_order = sorted(against, key=lambda row: order.index(row["verdict"]))
    ours = {(row["student"], row["labels"]): row for row in table if row["arm"] == "distilled"}
    return {_sentence(row, ours[row["student"], row["labels"]], test_images): row["verdict"] for row in in_order}


def _sentence(row: dict[str, Any], ours: dict[str, Any], test_images: int) -> str:
    under = f"{row['student']}, {LABELS[row['labels']]}"
    others = AGAINST[row["arm"]]
    if row["arm"] == "equal_bytes":
        others += f" ({row['images']:,} of them)"
    if row["verdict"] == "diverged":
        lost = " and ".join(
            f"{each['arm']} (seed {', '.join(map(str, each['diverged']))})" for each in (ours, row) if each["diverged"]
        )
        return (
            f"The distilled set and {others} are not compared: trainings diverged, of {lost}; lower `learning_rates` "
            f"({under})."
        )
    if row["verdict"] is None:
        points = points_of(row["difference"])
        return f"Distilled against {others}: {points} with one seed, which tells nothing ({under})."
    what = {
        "better": f"is better than {others}",
        "worse": f"is worse than {others}",
        "not separable": f"and {others} cannot be told apart",
    }[row["verdict"]]
    if row["verdict"] == "not separable" and abs(row["difference"]) > row["interval"]:
        what += f" by fewer than {LEAST_IMAGES} test images"
    points = points_of(row["difference"], row["interval"])
    return f"The distilled set {what}: {points}, {row['seeds']} seeds, {test_images:,} test images ({under})."


def points_of(difference: float, half_width: float | None = None) -> str:
    """Return a difference of shares in percentage points, with its interval where there is one: +3.8 ± 2.1 points."""
    signed = f"{100 * difference:+.1f}".replace("-", "\N{MINUS SIGN}")
    return f"{signed} points" if half_width is None else f"{signed} ± {100 * half_width:.1f} points"


def dd_ranking(table: Sequence[dict[str, Any]], student: str) -> dict[str, float]:
    """Return DD-Ranking's scores (Li et al., arXiv:2505.13300) of what was measured; fractions, more is better but HLR.

    HLR, the accuracy that hard labels lose against all real images; IOR, what the set gains on random real images in
    its own protocol, the teacher's labels; LRS = (e^α - e^-1) / (e - e^-1), with α = (IOR - HLR) / 2.

    Args:
        table: as `table_of` returns it.
        student: whose accuracies.
    """
    means = {
        (row["labels"], row["arm"]): row["mean"] for row in table if row["student"] == student and not row["diverged"]
    }
    scores = {}
    if ("hard", "real") in means and ("hard", "distilled") in means:
        scores["HLR"] = means["hard", "real"] - means["hard", "distilled"]
    if ("teacher", "distilled") in means and ("teacher", "random") in means:
        scores["IOR"] = means["teacher", "distilled"] - means["teacher", "random"]
    if len(scores) == 2:
        alpha = 0.5 * scores["IOR"] - 0.5 * scores["HLR"]
        scores["LRS"] = (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))
    return scores
