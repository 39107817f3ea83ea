"""The report of an evaluation: one folder of figures, tables, and a page that holds them all."""

import base64
import csv
import html
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from d4m_plugin.cache import written_whole
from d4m_plugin.card import accuracy, amount, counted, rates_of, with_caution
from d4m_plugin.evaluation.arms import WHAT_ARMS_ARE
from d4m_plugin.evaluation.figures import Features, draw_all
from d4m_plugin.evaluation.verdict import LABELS, points_of

WIDEST = 1600  # pixels of a picture in the page

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #f3f4f6; --line: #d5d9de; --good: #1a7f37;
  --bad: #b3261e; --open: #8a6100; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --paper: #15181c; --soft: #20252b; --line: #3a4048;
  --good: #57c97b; --bad: #ff8a80; --open: #e3b341; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { margin-top: 2.5rem; font-size: 1.2rem; }
.verdict { margin: .6rem 0; padding: .8rem 1rem; border-left: .4rem solid var(--open); background: var(--soft);
  font-size: 1.1rem; }
.better { border-color: var(--good); } .worse { border-color: var(--bad); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
dl { display: grid; grid-template-columns: minmax(0, 35%) minmax(0, 1fr); gap: .3rem 1rem; } dd { margin: 0; }
dt { font-weight: 600; }
@media (max-width: 30rem) { dl { display: block; } dd { margin-bottom: .6rem; } }
tr.ours { background: var(--soft); font-weight: 600; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; height: auto; background: #fff; border-radius: .4rem; }
figcaption { font-size: .9rem; }
pre { margin: 0; padding: .8rem 1rem; background: var(--soft); border-radius: .3rem; }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

UNDER_THE_TABLE = (
    "Mean ± standard deviation over the seeds. Differences are paired by seed, with their 95 % interval: where it "
    "holds zero, the two are not separable."
)

WHAT_FIGURES_SAY = {
    "frechet_distance": ("Fréchet distance (FID)", "to the real images, 0 is best; compare sets of one size only"),
    "kernel_distance": ("Kernel distance (KID)", "to the real images, 0 is best"),
    "inception_score": ("Inception score (IS)", "from 1 to the number of the network's classes"),
    "agreement": ("Named as their label", "of the distilled images"),
    "real_agreement": ("Real images named rightly", "of the real images, for comparison"),
    "coverage": ("Coverage", "of the real images have a distilled one among their five nearest"),
    "near_copies": ("Near copies", "images nearer to a real one than 99 % of real images are to another"),
    "blank": ("Blank", "images of one colour"),
    "real_images": ("Real images", "training images, drawn from all, that the pictures are compared with"),
}

SHARES = ("agreement", "real_agreement", "coverage")  # told in percent

SCORES = {
    "HLR": "what hard labels lose against all real images in as many steps; less is better",
    "IOR": "what the set gains on random real images, by the teacher's labels; more is better",
    "LRS": "both in one, from 0 to 1; more is better; published scores are of longer trainings on all real images",
}


def write_report(
    results: dict[str, Any], folder: Path, pictures: dict[str, Image.Image], features: Features | None = None
) -> Path:
    """Write results.json, results.csv (shares), the figures and report.html, and return the last.

    Args:
        results: what was measured.
        folder: where it goes.
        pictures: to be shown, by their captions.
        features: for the t-SNE: of distilled images, (N, D), their labels, of real ones, and theirs.
    """
    with written_whole(folder / "results.json") as path:
        path.write_text(json.dumps(results, indent=1, allow_nan=False), encoding="utf-8")
    write_csv(folder / "results.csv", results["table"])
    drawn = {caption: Image.open(folder / name) for name, caption in draw_all(results, folder, features).items()}
    with written_whole(folder / "report.html") as path:
        path.write_text(_page(results, drawn, pictures), encoding="utf-8")
    return folder / "report.html"


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of the same columns."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _page(results: dict[str, Any], drawn: Mapping[str, Image.Image], pictures: dict[str, Image.Image]) -> str:
    judged, protocol = results["set"], results["protocol"]
    title = html.escape(f"{judged['name']}: is it better than random real images?")
    size = f"{_a_class(judged)} of {len(judged['classes'])} classes, {judged['image_size']} pixels, "
    size += f"{judged['bytes']:,} bytes"
    parts = [
        f"<h1>{title}</h1>",
        f"<p>A distilled set of {html.escape(judged['source'])}: {size}.</p>",
        *_verdicts(results),
        *_by_student(results["table"], protocol),
        "<h2>Accuracy on the real test images</h2>",
        *_accuracies(results["table"]),
        *(_figure(caption, picture) for caption, picture in drawn.items()),
        "<h2>Pictures</h2>",
        *(_figure(caption, picture) for caption, picture in pictures.items()),
        *_section(
            f"What the features of {results['pictures'].get('network')} say of the pictures",
            {
                name: _told(key, results["pictures"][key], what)
                for key, (name, what) in WHAT_FIGURES_SAY.items()
                if results["pictures"].get(key) is not None
            },
        ),
        *_section(
            "DD-Ranking",
            {key: f"{_signed(f'{score:.3f}')}: {SCORES[key]}" for key, score in results["ranking"].items()},
        ),
        *_section("What was trained on", {arm: WHAT_ARMS_ARE[arm] for arm in protocol["arms"]}),
        *_section("Alike for all", _alike(judged, protocol)),
        "<h2>Run it again</h2>",
        "<p>SET is the folder of the set, SOURCE the real images that it was distilled from.</p>",
        _scrolling("command", f"<pre>{html.escape(_command(protocol))}</pre>"),
        *_section("Made with", results["versions"] | {"device": results["device"]}),
    ]
    return PAGE.format(title=title, style=STYLE, body="\n".join(parts))


def _verdicts(results: dict[str, Any]) -> list[str]:
    return [
        f'<p class="verdict {verdict if verdict in ("better", "worse") else ""}">{html.escape(sentence)}</p>'
        for sentence, verdict in with_caution(results).items()
    ]


def _accuracies(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the table of all trainings."""
    names = ("student", "labels", "trained on", "images", "accuracy, %", "distilled against it", "distilled is")
    cells = [[row["student"], row["labels"], row["arm"], amount(row), accuracy(row), *_against(row)] for row in rows]
    return [_table("accuracies", names, cells), f"<p>{UNDER_THE_TABLE}</p>"]


def _by_student(rows: Sequence[dict[str, Any]], protocol: dict[str, Any]) -> list[str]:
    """Return a table for each kind of labels that has a row for each student, where there are several."""
    if len(protocol["students"]) < 2:
        return []
    arms = protocol["arms"]
    found = {(row["labels"], row["student"], row["arm"]): row for row in rows}
    parts = ["<h2>Does the set serve other students?</h2>"]
    for labels in protocol["labels"]:
        names = ["student", *(f"{arm}, %" for arm in arms), "distilled against random", "distilled is"]
        cells = []
        for student in protocol["students"]:
            accuracies = [accuracy(found[labels, student, arm]) for arm in arms]
            cells.append([student, *accuracies, *_against(found[labels, student, "random"])])
        parts += [f"<p>By {LABELS[labels]}:</p>", _table(f"students, {labels} labels", names, cells)]
    return parts


def _against(row: dict[str, Any]) -> list[str]:
    """Return what the distilled set is against an arm: the difference, and the verdict."""
    return ["" if row["difference"] is None else points_of(row["difference"], row["interval"]), row["verdict"] or ""]


def _table(label: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = []
    for cells in rows:
        ours = ' class="ours"' if "distilled" in cells else ""
        lines.append(f"<tr{ours}>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>\n")
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in names)
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(lines)}</tbody></table>"
    return _scrolling(label, table)


def _scrolling(label: str, wide: str) -> str:
    """Return a box that scrolls what is wider than the page, by keys too."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">{wide}</div>'


def _figure(caption: str, picture: Image.Image) -> str:
    file, picture = io.BytesIO(), picture.copy()
    picture.thumbnail((WIDEST, 4 * WIDEST))
    picture.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _section(title: str, rows: dict[str, Any]) -> list[str]:
    if not rows:
        return []
    lines = "\n".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>" for name, value in rows.items())
    return [f"<h2>{html.escape(title)}</h2>", f"<dl>\n{lines}\n</dl>"]


def _alike(judged: dict[str, Any], protocol: dict[str, Any]) -> dict[str, Any]:
    edge = judged["image_size"]
    unlike = {"equal_bytes": "as many as fit", "real": "all"}
    others = "".join(f" ({arm}: {count})" for arm, count in unlike.items() if arm in protocol["arms"])
    return {
        "images": f"{_a_class(judged)}{others}, {edge} by {edge} pixels",
        "students": ", ".join(protocol["students"]),
        "steps": f"{protocol['steps']:,} of {protocol['batch_size']} images; the last one counts",
        "seeds": f"{protocol['seeds']}, of the student's weights, the batches and the random images",
        "learning rate": rates_of(protocol),
        "teacher": protocol["teacher"],
        "augmentation": "random crops, flips where the source allows them; with the teacher's labels, CutMix too",
    }


def _a_class(judged: dict[str, Any]) -> str:
    least, most = judged["ipc"]
    return f"{counted(most)} a class" if least == most else f"{least:,} to {counted(most)} a class"


def _command(protocol: dict[str, Any]) -> str:
    """Return the command of an evaluation; where the set and the real images lie is not recorded."""
    options = {name: json.dumps(list(protocol[name])) for name in ("arms", "labels", "students", "learning_rates")}
    options |= {name: str(protocol[name]) for name in ("seeds", "batch_size", "lr_smoothing", "teacher", "features")}
    options["budget"] = str(protocol["steps"])
    told = [f"--{name} {shlex.quote(value)}" for name, value in options.items()]
    return " \\\n    ".join(["d4m evaluate SET --source SOURCE", *told])


def _told(key: str, value: float, what: str) -> str:
    if key in SHARES:
        return f"{100 * value:.1f} % {what}"
    number = f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.3g}"
    return f"{_signed(number)}: {what}"


def _signed(number: str) -> str:
    return number.replace("-", "\N{MINUS SIGN}", 1) if number.startswith("-") else number
