import os
import shutil
import signal
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches a hub
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # a core each

import pytest
import torch
from hypothesis import settings

from d4m_plugin import DistilledDataset, cli, distill
from d4m_plugin.diffusion import LatentDiffusion
from tests import hub_server
from tests.forked import Forks
from tests.toys import Squares, save_random_pipeline

signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background ignores it, and so would all it starts
settings.register_profile("short", max_examples=50, deadline=None, database=None, derandomize=True)
settings.register_profile("long", max_examples=2000, deadline=None, database=None)
settings.load_profile("short")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """An empty cache for each test, and a working folder where Lightning may leave its logs."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # of an earlier test, by which samplers of processes draw
    monkeypatch.setenv("D4M_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch):
    """No test cuts the power, and the disks of CI machines take long over what would outlast it."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def random_pipeline(tmp_path_factory):
    """The folder of a pipeline with random weights."""
    return save_random_pipeline(tmp_path_factory.mktemp("pipelines") / "random")


@pytest.fixture(scope="session")
def random_model(random_pipeline):
    return LatentDiffusion(str(random_pipeline), dtype=torch.float32)


@pytest.fixture
def squares(random_pipeline, monkeypatch):
    monkeypatch.setattr(Squares, "diffusion", str(random_pipeline))
    return Squares()


@pytest.fixture(scope="session")
def distilled_once(random_pipeline, tmp_path_factory):
    """Put a copy of the squares' set of a recipe in a folder: it is distilled where it is first asked for."""
    made = {}

    def copied(recipe, folder):
        if str(recipe) not in made:
            source, place = Squares(), tmp_path_factory.mktemp("a-secret-place")
            source.diffusion = str(random_pipeline)
            made[str(recipe)] = distill(source, recipe, output=place / "set", cache_dir=place / "cache").root
        return DistilledDataset(shutil.copytree(made[str(recipe)], folder))

    return copied


@pytest.fixture(scope="session")
def the_hub():
    with hub_server.running() as hub:
        yield hub


@pytest.fixture(scope="session")
def forks(the_hub, tmp_path_factory):
    """Starts Pythons that have imported what takes seconds, and whose Hub is ours."""
    return Forks(
        {
            "HF_ENDPOINT": the_hub.url,
            "HF_HOME": str(tmp_path_factory.mktemp("client") / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parent.parent),
        }
    )


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command line in this process; give its exit status, output and errors."""

    def run_command(*words):
        monkeypatch.setattr(sys, "argv", ["d4m", *map(str, words)])
        status = 0
        try:
            cli.d4m()
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return run_command
