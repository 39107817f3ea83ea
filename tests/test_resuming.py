import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

import d4m_plugin.distillation as distillation
import d4m_plugin.units as units
from d4m_plugin import distill
from d4m_plugin.errors import InputError, InputWarning
from d4m_plugin.progress import Progress
from d4m_plugin.units import DamagedError, Units, in_turn, load_tensors, save_tensors
from tests import kills


def test_killed_at_fifteen_points_of_all_stages_the_set_is_the_same_to_the_byte(random_pipeline):
    """Two processes at a time, on 1 core each; in a process of its own, which forks."""
    command = [sys.executable, "-m", "tests.kills", str(random_pipeline), "15", "2", "0"]
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    ran = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True)
    told = json.loads(ran.stdout)
    assert sum(told["killed at"].values()) >= 15
    assert all(told["killed at"][stage] for stage in ("encode", "cluster", "synthesise", "write"))
    assert told["same to the byte"] == told["sets"]
    assert told["most units that a kill lost"] <= 2  # the one that it was at, and the one beside it
    assert told["left behind"] == 0


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(distillation, "BLOCK", 4)


@pytest.fixture
def stopped(squares, tmp_path, monkeypatch, small_blocks):
    """The folder of a run that was stopped before it put its set together."""
    with monkeypatch.context() as patch:

        def stop(*_):
            raise KeyboardInterrupt

        patch.setattr(distillation, "write_set", stop)
        with pytest.raises(KeyboardInterrupt):
            distill(squares, kills.RECIPE, output=tmp_path / "set")
    (work,) = (tmp_path / "set.partial").iterdir()
    return work


def test_a_set_that_was_moved_away_is_written_again(squares, tmp_path, stopped):
    (stopped / distillation.WRITTEN).touch()  # and the process was killed before it removed its work
    assert len(distill(squares, kills.RECIPE, output=tmp_path / "set")) == 3 * kills.RECIPE.ipc
    assert not stopped.exists()


def test_what_a_killed_process_of_the_same_number_left_is_no_hindrance(squares, tmp_path, stopped):
    left = distillation.aside_of(stopped / "set") / f"ipc-{kills.RECIPE.ipc}"
    left.mkdir(parents=True)
    (left / "half-written").touch()
    made = distill(squares, kills.RECIPE, output=tmp_path / "set")
    assert not (made.folder / "half-written").exists()


def truncated(path):
    path.write_bytes(path.read_bytes()[:-7])


def flipped(path):
    damaged, draw = bytearray(path.read_bytes()), random.Random(path.name)
    for position in draw.sample(range(len(damaged)), 3):
        damaged[position] ^= 1 << draw.randrange(8)
    path.write_bytes(damaged)


def empty(path):
    path.write_bytes(b"")


def of_another_shape(path):
    tensors = load_file(path)
    save_file({name: tensor[:1].repeat(2, *[1] * (tensor.ndim - 1)) for name, tensor in tensors.items()}, path)


def of_another_unit(path):
    others = [other for other in path.parent.glob("*.safetensors") if other.name[:5] == path.name[:5] and other != path]
    shutil.copy(others[0], path)


def zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [truncated, flipped, empty, of_another_shape, of_another_unit, zeros])
def test_damaged_units_are_told_and_made_again(damage, squares, tmp_path, stopped, monkeypatch):
    whole = kills.contents(distill(squares, kills.RECIPE, output=tmp_path / "whole").root)
    for name in ("class-000001.safetensors", "block-000000.safetensors", "block-000002.safetensors"):
        damage(stopped / name)
    made = []
    synthesise = distillation.synthesise
    monkeypatch.setattr(distillation, "synthesise", lambda *rest: made.append(rest[0][0]) or synthesise(*rest))
    with pytest.warns(InputWarning, match=r"is damaged .* It is made again\.") as warned:
        again = distill(squares, kills.RECIPE, output=tmp_path / "set")
    assert [Path(str(warning.message).split("'")[1]).name for warning in warned] == [
        "class-000001.safetensors",
        "block-000000.safetensors",
        "block-000002.safetensors",
    ]
    assert made == [(0, 0), (2, 0)]
    assert kills.contents(again.root) == whole


def test_a_unit_damaged_since_it_was_checked_is_told_and_made_again(squares, tmp_path, small_blocks, monkeypatch):
    whole = kills.contents(distill(squares, kills.RECIPE, output=tmp_path / "whole").root)
    write_set = distillation.write_set

    def damaged(*rest):
        truncated(rest[-1][1])
        write_set(*rest)

    with monkeypatch.context() as patch:
        patch.setattr(distillation, "write_set", damaged)
        with pytest.raises(InputError, match=r"block-000001.* is damaged .* Start again: it is made anew\."):
            distill(squares, kills.RECIPE, output=tmp_path / "set")
    with pytest.warns(InputWarning, match=r"block-000001.* is damaged .* It is made again\."):
        again = distill(squares, kills.RECIPE, output=tmp_path / "set")
    assert kills.contents(again.root) == whole


@pytest.mark.parametrize("damage", [truncated, flipped, empty, of_another_unit])
def test_damaged_latents_are_encoded_again(damage, squares, tmp_path):
    options = {"cache_dir": tmp_path / "cache", "keep_latents": True}
    whole = kills.contents(distill(squares, kills.RECIPE, output=tmp_path / "whole", **options).root)
    for path in (tmp_path / "cache" / "latents").glob("*/latents-000001.safetensors"):
        damage(path)
    with pytest.warns(InputWarning, match=r"latents-000001.* is damaged .* The class is encoded again"):
        again = distill(squares, kills.RECIPE, output=tmp_path / "again", **options)
    assert kills.contents(again.root) == whole


def test_who_may_read_other_files_may_read_tensors(tmp_path):
    """As another user of a shared cache; safetensors makes its files for their owner alone."""
    (tmp_path / "other").touch()
    save_tensors(tmp_path / "unit.safetensors", {"ones": torch.ones(2)})
    assert (tmp_path / "unit.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_unit_that_may_not_be_read_is_not_one_that_is_not_there(tmp_path, monkeypatch):
    save_tensors(tmp_path / "unit.safetensors", {"ones": torch.ones(2)})

    def refused(*_):
        raise PermissionError

    monkeypatch.setattr(Path, "open", refused)  # as the user of this machine may be root
    with pytest.raises(PermissionError):
        load_tensors(tmp_path / "unit.safetensors")


def test_a_flipped_bit_of_a_unit_is_noticed(tmp_path):
    path = tmp_path / "unit.safetensors"
    dtypes = (torch.float32, torch.float16, torch.uint8, torch.int64, torch.bool)
    written = {str(dtype): torch.arange(6).view(2, 3).to(dtype) for dtype in dtypes} | {"none": torch.ones(0)}
    save_tensors(path, written, made=0.5)
    whole, draw = path.read_bytes(), random.Random(0)
    noticed, bits = 0, draw.sample(range(8 * len(whole)), 1000)
    for bit in bits:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            read = load_tensors(path)
        except DamagedError:
            noticed += 1
        else:  # as where a space between two words of the header became another
            assert all(torch.equal(read[name], tensor) for name, tensor in written.items())
    assert noticed > 0.95 * len(bits)


def named(count):
    return {f"{number}.safetensors": 1 for number in range(count)}


def make_some(folder, count, progress, patience=None, most=None):
    """Return the units that were made here."""
    made = []
    with Units(folder, named(count), load_tensors, progress) as some:
        for free in some.rounds():
            for name in free:
                made.append(name)
                if most is not None and len(made) > most:
                    return made[:-1]
                save_tensors(folder / name, {"number": torch.tensor(int(name.split(".")[0]))})
    return made


def test_what_another_process_is_at_is_left_to_it_and_taken_over_when_it_ends(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(units, "SILENCE", 0.1)
    script = (
        "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "
        "print('taken', flush=True); time.sleep(60)"
    )
    lock = str(tmp_path / "1.safetensors.lock")
    other = subprocess.Popen([sys.executable, "-c", script, lock], stdout=subprocess.PIPE)
    with other.stdout:
        other.stdout.readline()
    asleep = []

    def sleep(seconds):
        asleep.append({path.name for path in tmp_path.glob("*.safetensors")})
        if len(asleep) == 3:
            other.kill()
            other.wait()
        real_sleep(seconds)

    real_sleep = time.sleep
    monkeypatch.setattr(units.time, "sleep", sleep)
    with Progress("Making", 3) as progress:
        assert make_some(tmp_path, 3, progress) == ["0.safetensors", "2.safetensors", "1.safetensors"]
    assert asleep[0] == {"0.safetensors", "2.safetensors"}  # all that was free came first
    assert "Waiting for 1 units that other processes are at, such as 1.safetensors." in capsys.readouterr().err


def test_what_a_process_holds_that_gives_no_sign_of_life_is_made_here(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "PATIENCE", 0.5)
    with FileLock(tmp_path / "0.safetensors.lock"), Progress("Making", 2) as progress:  # as by a lost machine
        assert make_some(tmp_path, 2, progress) == ["1.safetensors", "0.safetensors"]


def test_what_a_slow_process_is_at_is_left_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "PATIENCE", 0.5)
    monkeypatch.setattr(units, "BEAT", 0.1)
    taken, made = threading.Event(), []

    def slow():
        with Progress("Making", 2) as progress, Units(tmp_path, named(2), load_tensors, progress) as both:
            for free in both.rounds():
                for name in free:
                    taken.set()
                    time.sleep(2)
                    made.append(name)
                    save_tensors(tmp_path / name, {"number": torch.tensor(0)})

    other = threading.Thread(target=slow)
    other.start()
    taken.wait()
    with Progress("Making", 2) as progress:
        assert make_some(tmp_path, 2, progress) == ["1.safetensors"]
    other.join()
    assert made == ["0.safetensors"]


def test_waiting_for_another_process_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(units, "SILENCE", 0.1)
    taken = threading.Event()

    def theirs():
        with FileLock(tmp_path / "list.lock"):
            taken.set()
            time.sleep(0.5)

    threading.Thread(target=theirs).start()
    taken.wait()
    began = time.monotonic()
    with in_turn(tmp_path / "list", "checks the images"):
        assert time.monotonic() - began > 0.3
    assert capsys.readouterr().err == "Waiting for another process, which checks the images.\n"


def test_progress_counts_what_others_have_done(tmp_path):
    save_tensors(tmp_path / "1.safetensors", {})
    with Progress("Making", 3) as progress:
        assert make_some(tmp_path, 3, progress) == ["0.safetensors", "2.safetensors"]
        assert (progress.initial, progress.n) == (1, 3)


def test_units_taken_are_free_again_after_an_error(tmp_path):
    with Progress("Making", 3) as progress:
        assert make_some(tmp_path, 3, progress, most=1) == ["0.safetensors"]
        assert make_some(tmp_path, 3, progress) == ["1.safetensors", "2.safetensors"]


ON_A_SMALL_DISK = """
import subprocess, sys
from pathlib import Path
import d4m_plugin.distillation as distillation
from d4m_plugin import InputError
from tests import kills
from tests.toys import Squares

Squares.diffusion, distillation.BLOCK = sys.argv[1], 4
synthesise = distillation.synthesise

def distil(output):
    return distillation.distill(Squares(6, kills.CLASSES), kills.RECIPE, output=output)

def in_trouble(place, damage, repair):
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], check=True)
    change = lambda command: subprocess.run(command.replace("PLACE", str(place)), shell=True, check=True)
    made = []

    def then_trouble(*arguments):
        made.append(arguments)
        if len(made) == 3:
            change(damage)
        return synthesise(*arguments)

    distillation.synthesise = then_trouble
    output = place / "set"
    try:
        distil(output)
    except InputError as error:
        print(error)
    assert not output.exists()
    change(repair)
    distil(output)
    assert 7 <= len(made) < 10, len(made)  # six blocks; lost was the third, and perhaps one or both beside it
    assert kills.contents(output) == kills.contents(distil(place / "whole").root)

for number in range(2, len(sys.argv), 2):
    in_trouble(Path(str(number)).absolute(), *sys.argv[number : number + 2])
"""
TROUBLES = [  # what befalls a disk, its end, and what the user is told
    ("cat /dev/zero > PLACE/filler || true", "rm PLACE/filler", "No space left on device"),
    ("mount --bind PLACE PLACE && mount -o remount,bind,ro PLACE", "umount PLACE", "Read-only file system"),
]


@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode != 0,
    reason="needs leave to mount a file system",
)
def test_a_disk_that_fills_up_or_turns_read_only_damages_nothing(random_pipeline):
    command = ["unshare", "-rm", sys.executable, "-c", ON_A_SMALL_DISK, str(random_pipeline)]
    command += [word for damage, repair, _ in TROUBLES for word in (damage, repair)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    sentences = ran.stdout.splitlines()
    for sentence, (*_, told) in zip(sentences, TROUBLES, strict=True):
        assert f"could not be used ({told}); what is done is kept: mend that and start again." in sentence
