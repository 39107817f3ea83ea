"""What README and docs show: links lead somewhere, and every command is one that the command line takes."""

import functools
import re
import shlex
import sys
from pathlib import Path

import jsonargparse
import pytest

import d4m_plugin
from d4m_plugin import cli, commands
from d4m_plugin.lightning_cli import D4MCLI

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
]
FENCED = re.compile(r"^```bash\n(.*?)^```", re.S | re.M)
OURS = re.compile(r"(?:^|/|\s)(?:(?:d4m|lightning)|-m d4m_plugin)\s+(?=[a-z])(.*)")


def without_code(page):
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)


def anchors_of(page):
    headings = re.findall(r"^#+ (.*)$", without_code(page), re.M)
    plain = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        assert not anchor or anchor in anchors_of(there), target


def commands_of(page):
    for block in FENCED.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            if found := OURS.search(line.rpartition(" && ")[2]):
                words = found[1].replace("$ipc", "10").replace("my_project.MyModule", "ImageClassifier")
                yield shlex.split(words, comments=True)


SHOWN = [(page.name, words) for page in PAGES for words in commands_of(page)]


def test_commands_are_found():
    assert len(SHOWN) > 20
    assert {words[0] for _, words in SHOWN} >= {"fit", "distill", "preview", "evaluate", "sweep", "compare", "push"}


@pytest.mark.parametrize(("page", "words"), SHOWN, ids=[" ".join([page, *words])[:70] for page, words in SHOWN])
def test_every_command_is_one_that_the_command_line_takes(page, words, run, monkeypatch):
    def stub(function):
        return functools.wraps(function)(lambda **options: {"called with": options})

    monkeypatch.chdir(ROOT)
    function_of = commands.function_of
    monkeypatch.setattr(commands, "function_of", lambda command: stub(function_of(command)))
    monkeypatch.setattr(jsonargparse.ArgumentParser, "instantiate", lambda self, options: options)
    monkeypatch.setattr(D4MCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(D4MCLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.setattr(cli, "log_to", lambda file: None)
    status, _, err = run(*words)
    assert status == 0, err
    assert words[0] in cli.COMMANDS
    assert sys.argv[1:] == words


def test_every_example_is_shown():
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    shown = re.findall(r'^--8<-- "config_examples/(.*)"$', page, re.M)
    assert sorted(shown) == sorted(path.name for path in (ROOT / "config_examples").iterdir() if path.is_file())


def test_every_public_name_is_on_the_page_of_the_api():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: d4m_plugin\.(\w+)$", page, re.M)) == sorted(d4m_plugin.__all__)
