import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

import d4m_plugin.distillation as distillation
from d4m_plugin import InputError, Recipe, distill
from d4m_plugin.housekeeping import cache
from tests.toys import Squares

RECIPE = Recipe(ipc=4, num_inference_steps=2)


@pytest.fixture(scope="module")
def kept(random_pipeline, tmp_path_factory):
    """Two caches: of a set with its latents, and of one that was stopped before it was written."""
    source, (whole, half) = Squares(), (tmp_path_factory.mktemp(name) for name in ("whole", "half"))
    source.diffusion = str(random_pipeline)
    distill(source, RECIPE, keep_latents=True, cache_dir=whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "write_set", None)
        with pytest.raises(TypeError):
            distill(source, Recipe(ipc=2, num_inference_steps=2), cache_dir=half)
    return whole, half


@pytest.fixture
def finished(kept):
    here = shutil.copytree(kept[0], distillation.resolve_cache_dir(), dirs_exist_ok=True)
    (folder,) = (path for path in (here / "sets").iterdir() if (path / "README.md").exists())
    return folder


@pytest.fixture
def unfinished(kept):
    here = shutil.copytree(kept[1], distillation.resolve_cache_dir(), dirs_exist_ok=True)
    (folder,) = (here / "sets").glob("*.partial")
    return folder


def test_the_list_tells_what_is_finished_from_which_recipe_and_what_is_not(finished, unfinished):
    told = cache("list", ())
    latents = next(name for name in told if name.startswith("latents/"))
    assert told.keys() == {f"sets/{finished.name}", f"sets/{unfinished.name}", latents}
    assert "finished: squares by random, ipc 4, strength 0.7, guidance_scale 8.0" in told[f"sets/{finished.name}"]
    assert "unfinished: 3 classes and 1 blocks of images done" in told[f"sets/{unfinished.name}"]


def test_damage_is_found_and_can_be_removed(finished, unfinished, squares):
    assert set(cache("verify", ()).values()) == {"whole"}
    damaged = [finished / "ipc-4" / "preview.png", next(unfinished.glob("*/block-000000.safetensors"))]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(
        InputError, match=r"2 of 3 are damaged: .*block-000000.*preview.png.*`d4m cache remove sets/"
    ) as told:
        cache("verify", ())
    names = str(told.value).split("cache remove ")[1].rstrip("`.").split(" ")
    assert set(cache("remove", tuple(names))) == set(names)
    assert set(cache("verify", ()).values()) == {"whole"}
    assert len(distill(squares, RECIPE)) == 12


def test_a_damaged_record_is_listed_as_such(finished):
    record = finished / "ipc-4" / "d4m.json"
    record.write_text(record.read_text()[:-9])
    assert cache("list", ())[f"sets/{finished.name}"].endswith(", damaged")
    with pytest.raises(InputError, match=f"1 of 2 are damaged: sets/{finished.name} .d4m.json"):
        cache("verify", ())


def test_only_old_unfinished_work_is_pruned(finished, unfinished):
    assert cache("prune", ()) == {"removed": "nothing"}
    week = time.time() - 8 * 24 * 60 * 60
    for path in (finished, unfinished, *finished.rglob("*"), *unfinished.rglob("*")):
        os.utime(path, (week, week))
    assert list(cache("prune", ())) == [f"sets/{unfinished.name}"]
    assert finished.exists()
    assert not unfinished.exists()


def test_work_that_another_process_is_at_is_not_removed(unfinished):
    lock = next(unfinished.glob("*/*.lock"))
    with FileLock(lock), pytest.raises(InputError, match="is in use by another process"):
        cache("remove", (f"sets/{unfinished.name}",))
    assert unfinished.exists()


@pytest.mark.parametrize("name", ["sets/none", "../sets", "/etc", "sets/../../x", ""])
def test_nothing_outside_the_cache_can_be_named(name, finished):
    with pytest.raises(InputError, match="is not in the cache"):
        cache("remove", (name,))


def test_the_command_takes_words(finished, run):
    status, printed, _ = run("cache", "list")
    assert status == 0
    assert f"sets/{finished.name}" in printed
    status, printed, _ = run("cache", "remove", f"sets/{finished.name}")
    assert (status, "removed" in printed, finished.exists()) == (0, True, False)
    status, _, said = run("cache", "remove", f"sets/{finished.name}", "--older_than", "3")
    assert status == 2
    assert said.startswith(f"error: `names` has 'sets/{finished.name}', which is not in the cache")


def test_an_error_is_told_once_and_without_a_terminals_commands(tmp_path):
    command = [sys.executable, "-m", "d4m_plugin", "cache", "remove", "sets/\x1b]0;owned\x07"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert ran.returncode == 2
    assert ran.stderr.count("error: `names` has 'sets/") == 1
    assert "\x1b" not in ran.stderr


def test_an_empty_cache_is_told():
    assert list(cache("list", ())) == list(cache("verify", ())) == ["empty"]


def test_what_killed_processes_left_is_pruned_wherever_it_lies(finished):
    root = finished.parents[1]
    (latents,) = (root / "latents").iterdir()
    left = latents / ".latents-000000.safetensors.host.123"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    assert list(cache("prune", ())) == [str(left.relative_to(root))]
    assert latents.exists()
    assert not left.exists()


def test_other_peoples_files_in_the_cache_folder_are_left_alone(finished):
    root = finished.parents[1]
    theirs = [root / "notes" / ".draft.2", root / "sets" / ".vimrc.1", root / "project" / ".backup.host.2023"]
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
        path.write_text("a thesis")
        os.utime(path, (0, 0))
    assert cache("prune", ()) == {"removed": "nothing"}
    assert all(path.exists() for path in theirs)


def test_a_set_that_is_being_put_together_is_not_called_damaged(unfinished):
    (work,) = (path for path in unfinished.iterdir() if path.is_dir())
    folder = work / ".set.host.123" / "ipc-2"
    folder.mkdir(parents=True)
    (folder / "prototypes.safetensors").write_bytes(b"half")
    assert cache("verify", (f"sets/{unfinished.name}",)) == {f"sets/{unfinished.name}": "whole"}


def test_what_a_killed_process_left_in_unfinished_work_goes_with_it(unfinished):
    left = next(unfinished.glob("*/class-000000.safetensors")).with_name(".class-000000.safetensors.host.123")
    left.write_bytes(b"half")
    for path in (unfinished, *unfinished.rglob("*")):
        os.utime(path, (0, 0))
    assert list(cache("prune", ())) == [f"sets/{unfinished.name}"]
    assert not unfinished.exists()
