import ast
import graphlib
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import d4m_plugin

ROOT = Path(__file__).parent.parent


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout


@pytest.mark.parametrize("name", d4m_plugin.__all__)
def test_each_public_name_is_there(name):
    assert getattr(d4m_plugin, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        d4m_plugin.nonsense  # noqa: B018  # the access is the test


def test_importing_the_package_loads_nothing_heavy():
    loaded = run_python("import sys, d4m_plugin; print(*sys.modules)").split()
    assert not {"torch", "lightning", "diffusers", "numpy", "sklearn"} & set(loaded)


def test_the_core_imports_no_lightning():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    adapters = re.findall(r"`(\w+)`", re.search(r"The core, everything but (.*?), imports no Lightning", text, re.S)[1])
    modules = {name for name, _ in imports() if name.count(".") == 1} - {f"d4m_plugin.{each}" for each in adapters}
    assert "d4m_plugin.commands" in modules
    code = "; ".join(f"import {name}" for name in sorted(modules - {"d4m_plugin.__main__"}))
    assert "lightning" not in run_python(f"{code}; import sys; print(*sys.modules)").split()


def imports():
    """What each module imports of the package, inside its functions too."""
    names = {}
    for path in sorted((ROOT / "d4m_plugin").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    for name, path in names.items():
        statements = [each for each in ast.walk(ast.parse(path.read_text())) if isinstance(each, ast.ImportFrom)]
        whole = {f"{each.module}.{alias.name}" for each in statements for alias in each.names}
        yield name, (whole | {each.module for each in statements}) & names.keys() - {name, "d4m_plugin"}


def test_imports_between_modules_go_one_way():
    graph = dict(imports())
    assert graph["d4m_plugin.synthesis"] > {"d4m_plugin.diffusion", "d4m_plugin.prototypes"}
    graph["d4m_plugin.teachers"].remove("d4m_plugin.teaching")  # as CONTRIBUTING.md says
    graph["d4m_plugin.distilled"].remove("d4m_plugin.pushing")  # a method of the set, which knows no more of it
    list(graphlib.TopologicalSorter(graph).static_order())  # a CycleError names the modules


def test_imports_follow_the_road_that_contributors_read():
    lines = (ROOT / "CONTRIBUTING.md").read_text().splitlines()
    rows = [re.findall(r"`(\w+)`", line.split("|")[2]) for line in lines if re.match(r"\| [a-z].* \| `", line)]
    place = {name: number for number, row in enumerate(rows) for name in row}
    graph = {name.split(".")[1]: set() for name, _ in imports() if "." in name}
    for name, needs in imports():
        if "." in name:
            graph[name.split(".")[1]] |= {each.split(".")[1] for each in needs}
    assert place.keys() == graph.keys()
    graph["teachers"].remove("teaching")
    assert [(name, need) for name, needs in graph.items() for need in needs if place[need] > place[name]] == []


@pytest.mark.parametrize("folder", ["datamodules", "callbacks"])
def test_the_top_level_folders_give_the_packages_classes(folder, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    sys.modules.pop(folder, None)
    top, inside = importlib.import_module(folder), importlib.import_module(f"d4m_plugin.{folder}")
    assert top.__all__ == inside.__all__
    for name in top.__all__:
        assert getattr(top, name) is getattr(inside, name)
