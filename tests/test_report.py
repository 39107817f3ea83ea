"""The report of an evaluation: everything in one folder, and one page that needs nothing else."""

import csv
import html
import inspect
import json
import re
import shlex
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from d4m_plugin.evaluation.evaluate import evaluate
from d4m_plugin.evaluation.figures import MOST_POINTS, _spread
from d4m_plugin.evaluation.report import write_report
from d4m_plugin.evaluation.verdict import dd_ranking, sentences, table_of

FIGURES = {"accuracy.png", "classes.png", "confusion.png", "losses.png", "tsne.png"}
VOID = {"meta", "img", "br", "link", "input"}


def results_of(classes, seeds=2):
    arms, kinds = ("distilled", "random", "real"), ("teacher", "hard")
    runs = [
        {
            "arm": arm,
            "labels": labels,
            "student": "convnet",
            "seed": seed,
            "lr": 1e-3,
            "accuracy": 0.5 + 0.02 * seed * place + 0.1 * (labels == "hard"),
            "confusion": (torch.eye(len(classes)).long() * 3 + 1).tolist(),
            "losses": [[1, 2.0], [2, 1.0 + place]],
            "seconds": 1.0,
        }
        for seed in range(seeds)
        for labels in kinds
        for place, arm in enumerate(arms)
    ]
    amounts = {arm: {"images": 10, "bytes": 4321 if arm == "distilled" else None} for arm in arms}
    table = table_of(runs, amounts, 1000)
    return {
        "set": {
            "name": "toys-ipc-1",
            "source": "toys",
            "classes": list(classes),
            "ipc": 1,
            "bytes": 4321,
            "image_size": 8,
            "fingerprint": "0",
        },
        "protocol": {
            "arms": arms,
            "labels": kinds,
            "students": ["convnet"],
            "seeds": seeds,
            "steps": 2,
            "batch_size": 4,
            "learning_rates": [1e-3],
            "teacher": "toys",
        },
        "versions": {"torch": "2.14"},
        "device": "cpu",
        "runs": runs,
        "table": table,
        "verdicts": sentences(table),
        "ranking": dd_ranking(table, "convnet"),
        "pictures": {"network": "toys", "frechet_distance": None, "coverage": 0.25, "near_copies": 1234}
        | {"kernel_distance": -0.01, "inception_score": 1234.5},
    }


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(0)
    made, real = torch.randn(10, 4, generator=generator), torch.randn(40, 4, generator=generator)
    return made, torch.arange(10) % 2, real, torch.arange(40) % 2


class Page(HTMLParser):
    """Notes what is open, and what is asked of elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elsewhere, self.alts, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        attrs = dict(attrs)
        links = [attrs.get("src", "data:"), attrs.get("href", "data:")]
        self.elsewhere += [link for link in links if not link.startswith("data:image/png;base64,") and link != "data:"]
        if tag == "img":
            self.alts.append(attrs["alt"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_folder_has_figures_tables_and_a_page_that_needs_nothing_else(tmp_path, features):
    results = results_of(("cat", "dog"))
    pictures = {"distilled": Image.effect_noise((32, 32), 50).convert("RGB")}
    page = write_report(results, tmp_path, pictures, features)
    for figure in FIGURES:
        assert len(set(Image.open(tmp_path / figure).convert("L").tobytes())) > 10, figure
    parsed = Page(page.read_text())
    assert (parsed.open, parsed.elsewhere) == ([], [])
    assert len(parsed.alts) == len(FIGURES) + 1
    assert all(parsed.alts)
    assert "script" not in parsed.tags
    assert not re.search(r"url\(|@import", page.read_text())
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["arm"] for row in rows] == [row["arm"] for row in results["table"]]
    assert [float(row["mean"]) for row in rows] == [row["mean"] for row in results["table"]]


def test_the_page_says_the_verdicts_first_in_words(tmp_path):
    results = results_of(("cat", "dog"))
    text = write_report(results, tmp_path, {}).read_text()
    assert text.index("cannot be told apart") < text.index("<table>")
    assert "51.0 ± 1.4" in text  # random: 50 and 52 %
    assert "\N{MINUS SIGN}1.0 ± 12.7 points" in text
    assert "1,234: images nearer to a real one" in text
    assert "25.0 % of the real images" in text
    assert "\N{MINUS SIGN}0.01: to the real images" in text
    assert "1,234: from 1 to" in text  # 1234.5, without an exponent
    assert "\N{MINUS SIGN}0.010: what the set gains" in text
    assert "Fréchet" not in text  # there is none


def test_a_class_name_is_text_and_never_code(tmp_path):
    results = results_of(("<script>alert(1)</script>", "a & b"))
    results["set"]["name"] = "<b>set</b>"
    parsed = Page(write_report(results, tmp_path, {"<i>picture</i>": Image.new("RGB", (8, 8))}).read_text())
    assert not {"script", "b", "i"} & set(parsed.tags)
    assert parsed.open == []


def test_one_seed_and_many_classes_leave_out_what_cannot_be_shown(tmp_path):
    text = write_report(results_of([f"class {n}" for n in range(40)], seeds=1), tmp_path, {}).read_text()
    assert "with one seed, which tells nothing" in text
    assert "Accuracy of each arm, with one seed." in text
    assert "one standard deviation" not in text
    assert not (tmp_path / "confusion.png").exists()
    assert (tmp_path / "accuracy.png").exists()


def test_a_name_with_dollars_is_no_formula(tmp_path, features):
    results = results_of((r"$\frac$", "$x^{$"))
    results["pictures"]["network"] = r"$\unknown$"
    write_report(results, tmp_path, {}, features)
    assert (tmp_path / "tsne.png").exists()


def test_classes_that_come_in_turn_are_all_drawn_among_the_points():
    labels = np.arange(5000) % 10
    assert np.bincount(labels[_spread(5000)], minlength=10).min() > MOST_POINTS / 10 / 2
    assert _spread(7).tolist() == list(range(7))


def test_the_command_to_run_it_again_has_the_options_of_evaluate(tmp_path):
    results = results_of(("cat", "dog"))
    results["protocol"]["teacher"] = "<my> last.ckpt"
    text = write_report(results, tmp_path, {}).read_text()
    command = html.unescape(re.search("<pre>(.*?)</pre>", text, re.DOTALL)[1])
    words = shlex.split(command.replace("\\\n", ""))
    assert words[:3] == ["d4m", "evaluate", "SET"]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    assert {name.removeprefix("--") for name in options} <= set(inspect.signature(evaluate).parameters)
    assert json.loads(options["--arms"]) == ["distilled", "random", "real"]
    assert (options["--teacher"], options["--budget"]) == ("<my> last.ckpt", "2")
