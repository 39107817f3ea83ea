"""The report of an evaluation: everything in one folder, and one page that needs nothing else."""

import csv
import html
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import threading
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.text import Text
from PIL import Image

from d4m_plugin.evaluation.evaluate import evaluate
from d4m_plugin.evaluation.figures import MOST_POINTS, _spread
from d4m_plugin.evaluation.report import write_report
from d4m_plugin.evaluation.verdict import dd_ranking, sentences, table_of
from d4m_plugin.lettering import font_for
from d4m_plugin.preview import grid

FIGURES = {"accuracy.png", "classes.png", "confusion.png", "losses.png", "tsne.png"}
VOID = {"meta", "img", "br", "link", "input"}


def results_of(classes, seeds=2, students=("convnet",)):
    arms, kinds = ("distilled", "random", "real"), ("teacher", "hard")
    runs = [
        {
            "arm": arm,
            "labels": labels,
            "student": student,
            "seed": seed,
            "lr": 1e-3,
            "accuracy": 0.5 + 0.02 * seed * place + 0.1 * (labels == "hard"),
            "accuracies": [0.5 + 0.01 * (label % 40) for label in range(len(classes))],
            "confusion": (torch.eye(len(classes)).long() * 3 + 1).tolist() if len(classes) <= 100 else None,
            "losses": [[1, 2.0], [2, 1.0 + place]],
            "seconds": 1.0,
        }
        for seed in range(seeds)
        for student in students
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
            "ipc": [1, 1],
            "bytes": 4321,
            "image_size": 8,
            "fingerprint": "0",
        },
        "protocol": {
            "arms": arms,
            "labels": kinds,
            "students": list(students),
            "seeds": seeds,
            "steps": 2,
            "batch_size": 4,
            "learning_rates": [1e-3],
            "lr_smoothing": 2.0,
            "teacher": "toys",
            "features": "teacher",
        },
        "versions": {"torch": "2.14"},
        "device": "cpu",
        "runs": runs,
        "table": table,
        "caution": "",
        "verdicts": sentences(table, 1000),
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


def test_an_uneven_set_is_not_called_even(tmp_path):
    results = results_of(("cat", "dog"))
    assert write_report(results, tmp_path, {}).read_text().count("1 image a class") == 2
    results["set"]["ipc"] = [0, 1234]
    assert write_report(results, tmp_path, {}).read_text().count("0 to 1,234 images a class") == 2


def test_several_students_have_a_row_and_a_verdict_each(tmp_path):
    students = ("convnet", "resnet18", "<vit>")
    results = results_of(("cat", "dog"), students=students)
    text = write_report(results, tmp_path, {}).read_text()
    section = text.partition("Does the set serve other students?")[2].partition("<h2>")[0]
    rows = re.findall("<tr>(.*?)</tr>", section)
    heads = [re.findall("<th[^>]*>(.*?)</th>", row) for row in rows if "<th" in row]
    assert (
        heads == [["student", "distilled, %", "random, %", "real, %", "distilled against random", "distilled is"]] * 2
    )
    cells = [re.findall("<td>(.*?)</td>", row) for row in rows if "<td" in row]
    assert [html.unescape(row[0]) for row in cells] == [*students] * 2
    assert {(row[1], row[2], row[-1]) for row in cells[:3]} == {("50.0 ± 0.0", "51.0 ± 1.4", "not separable")}
    verdicts = re.findall('<p class="verdict.*?</p>', text)
    assert [sum(html.escape(student) in each for each in verdicts) for student in students] == [2, 2, 2]
    assert "other students" not in write_report(results_of(("cat", "dog")), tmp_path, {}).read_text()


CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell"))), None
)
# A phone 390 pixels wide looks at the page, and says what it sees.
PHONE = """<!doctype html><title>phone</title><iframe width="390" height="800" srcdoc="{page}"></iframe><script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument, body = page.body;
  const style = (element) => page.defaultView.getComputedStyle(element);
  const colours = (element) => [style(element).color, style(element).backgroundColor];
  console.log("SEEN" + JSON.stringify({{
    dark: page.defaultView.matchMedia("(prefers-color-scheme: dark)").matches,
    width: page.documentElement.scrollWidth,
    letters: parseFloat(style(body).fontSize),
    pictures: [...page.images].map((picture) => picture.naturalWidth && picture.getBoundingClientRect().width),
    colours: [body, page.querySelector(".verdict"), page.querySelector("tr.ours")].map(colours),
  }}) + "SEEN");
}};
</script>"""


def contrast(colours):
    """As WCAG has it, of two such as "rgb(27, 31, 36)"."""
    shares = [[int(number) / 255 for number in re.findall(r"\d+", colour)] for colour in colours]
    linear = [[each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in rgb] for rgb in shares]
    dark, light = sorted(0.2126 * red + 0.7152 * green + 0.0722 * blue for red, green, blue in linear)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is found here; name one in the environment as CHROMIUM")
@pytest.mark.parametrize("dark", [True, False])
def test_the_page_reads_well_on_a_phone(tmp_path, features, dark):
    results = results_of(("cat", "a" * 200), students=("convnet", "resnet18"))
    page = write_report(results, tmp_path, {"distilled": Image.new("RGB", (1600, 64))}, features).read_text()
    (tmp_path / "phone.html").write_text(PHONE.format(page=html.escape(page)))
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    words = ["--headless", "--no-sandbox", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'user'}", scheme]
    command = [CHROMIUM, *words, f"file://{tmp_path / 'phone.html'}"]
    said = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as browser:
        timer = threading.Timer(60, browser.kill)
        timer.start()
        for line in browser.stderr:
            said += [line] if ":CONSOLE" in line else []
            if "SEEN" in line:
                break
        timer.cancel()
        browser.kill()
    (line,) = said  # and nothing else, such as an error
    seen = json.loads(line.split("SEEN")[1])
    assert seen["dark"] == dark
    assert seen["width"] <= 390
    assert seen["letters"] >= 16
    assert len(seen["pictures"]) == len(FIGURES) + 1
    assert all(0 < width <= 390 for width in seen["pictures"])
    assert all(contrast(pair) > 7 for pair in seen["colours"])


def test_a_class_name_is_text_and_never_code(tmp_path):
    results = results_of(("<script>alert(1)</script>", "a & b"))
    results["set"]["name"] = "<b>set</b>"
    parsed = Page(write_report(results, tmp_path, {"<i>picture</i>": Image.new("RGB", (8, 8))}).read_text())
    assert not {"script", "b", "i"} & set(parsed.tags)
    assert parsed.open == []


def test_one_seed_has_no_spread(tmp_path):
    text = write_report(results_of(("cat", "dog"), seeds=1), tmp_path, {}).read_text()
    assert "with one seed, which tells nothing" in text
    assert "Accuracy of each arm, with one seed." in text
    assert "one standard deviation" not in text


@pytest.fixture
def texts(monkeypatch):
    """What is written in each figure, by its file."""
    written, savefig = {}, Figure.savefig

    def spy(figure, path, **options):
        savefig(figure, path, **options)
        written[path.name] = list(dict.fromkeys(text.get_text() for text in figure.findobj(Text)))

    monkeypatch.setattr(Figure, "savefig", spy)
    return written


@pytest.mark.parametrize("count", [100, 1000])
def test_of_many_classes_the_extremes_and_the_most_confused_are_shown(tmp_path, texts, count):
    names = [f"name {n}" for n in range(count)]
    results = results_of(names)
    for run in results["runs"]:
        run["accuracies"] = [(7 * n % count) / count for n in range(count)]  # name n is at place 7n
        run["accuracies"][1] = None  # of which there is no test image
        if count == 100:
            run["confusion"] = (torch.eye(count).long() * 3).tolist()
            run["confusion"][2][5] = 4
    text = write_report(results, tmp_path, {}).read_text()
    named = [text for text in texts["classes.png"] if text.startswith("name ")]
    places = sorted(range(count), key=lambda n: 7 * n % count)
    places.remove(1)
    assert named == [f"name {n}" for n in places[:10] + places[-10:]]
    assert f"Accuracies of all {count:,} classes" in text
    if count == 100:
        assert next(text for text in texts["confusion.png"] if "name" in text) == "name 2 → name 5"
    else:
        assert "confusion.png" not in texts
    for figure in texts:
        with Image.open(tmp_path / figure) as picture:
            assert max(picture.size) < 2000


def test_of_many_classes_few_may_have_test_images(tmp_path, texts):
    results = results_of([f"name {n}" for n in range(40)])
    for run in results["runs"]:
        run["accuracies"] = [n / 6 if n < 6 else None for n in range(40)]
    write_report(results, tmp_path, {})
    named = [text for text in texts["classes.png"] if text.startswith("name ")]
    assert named == [f"name {n}" for n in range(6)]


def test_of_many_classes_some_are_drawn_among_the_points(tmp_path, texts):
    labels = torch.arange(400) % 200
    features = (torch.rand(400, 4), labels, torch.rand(400, 4), labels)
    text = write_report(results_of([f"name {n}" for n in range(200)]), tmp_path, {}, features).read_text()
    named = [text for text in texts["tsne.png"] if text.startswith("name ")]
    assert (len(named), named[0], named[-1]) == (20, "name 0", "name 199")
    assert "20 of the 200 classes" in text


@pytest.mark.filterwarnings("error")
def test_a_name_that_no_font_can_write_is_a_number(tmp_path, features, texts):
    write_report(results_of(("\U0010fffd", "собака")), tmp_path, {}, features)
    for figure in ("classes.png", "confusion.png", "tsne.png"):
        assert {"class 0", "собака"} <= {*texts[figure]}, figure
    row = torch.zeros(1, 3, 32, 32)
    assert grid([row], ["\U0010fffd"]).tobytes() == grid([row], ["row 1"]).tobytes()


def test_a_font_that_has_the_letters_is_found(tmp_path, monkeypatch):
    """Of a font made here, as no machine's fonts are another's."""
    outline = TTGlyphPen(None)
    for move, *point in (("moveTo", (0, 0)), ("lineTo", (0, 500)), ("lineTo", (500, 0))):
        getattr(outline, move)(*point)
    outline.closePath()
    font = FontBuilder(1000)
    font.setupGlyphOrder([".notdef", "cat"])
    font.setupCharacterMap({ord("猫"): "cat"})
    font.setupGlyf(dict.fromkeys([".notdef", "cat"], outline.glyph()))
    font.setupHorizontalMetrics(dict.fromkeys([".notdef", "cat"], (600, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Noto Sans Toy", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(tmp_path / "toy.ttf")
    monkeypatch.setattr(fontManager, "ttflist", [*fontManager.ttflist])
    fontManager.addfont(tmp_path / "toy.ttf")
    font_for.cache_clear()
    try:
        assert font_for("猫").fname == str(tmp_path / "toy.ttf")
        assert font_for("cat").name == "DejaVu Sans"
    finally:
        font_for.cache_clear()


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
    assert float(options["--lr_smoothing"]) == 2
    assert "stretched 2 times" in text
