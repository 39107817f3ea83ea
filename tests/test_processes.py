import os
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from d4m_plugin import InputError, Recipe, distill
from d4m_plugin.console import to_the_user
from d4m_plugin.errors import InputWarning
from d4m_plugin.processes import on_all_devices
from tests.kills import contents
from tests.toys import Squares

TORCHRUN = {"TORCHELASTIC_RUN_ID": "run", "WORLD_SIZE": "2", "GROUP_RANK": "0"}
SLURM = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}


@pytest.fixture
def start(forks, squares, tmp_path):
    """Start `d4m distill` on the squares, in a process group of its own."""
    started = []

    def start(*options, **environment):
        words = ["-m", "d4m_plugin", "distill", "--source", "tests.toys.Squares", "--ipc", "4", "--prototypes", "2"]
        words += ["--diffusion", squares.diffusion, "--output", tmp_path / "set", *options]
        folder = tmp_path / f"said-{len(started)}"
        folder.mkdir()
        started.append(forks.start(*words, folder=folder, **environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def of_one_process(squares, folder, steps, ipc=4):
    recipe = Recipe(ipc=ipc, prototypes=2, num_inference_steps=steps, diffusion=squares.diffusion)
    as_parsed = Squares(per_class=6, classes=squares.classes)  # the record has what the command line passes on
    return contents(distill(as_parsed, recipe, output=folder).root)


def wait_until_it_holds_a_unit(process):
    for _ in range(6000):
        for held in Path(f"/proc/{process}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed since
                if ".safetensors.lock" in str(held.readlink()):
                    return
        time.sleep(0.01)
    raise AssertionError("it took no unit")


def other_of(process):
    """Wait for the second process of a command, and return its id."""
    for _ in range(600):
        for line in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            if b"\0-P\0-m\0d4m_plugin" in Path(f"/proc/{line}/cmdline").read_bytes():
                return int(line)
        time.sleep(0.1)
    raise AssertionError("no other process")


def test_two_processes_make_the_set_of_one_and_the_death_of_one_does_not_stop_the_other(start, squares, tmp_path):
    process = start("--devices", "2", "--num_inference_steps", "100", "--ipc", "8")
    other = other_of(process)
    process.send_signal(signal.SIGSTOP)  # else it might be done before the other, which starts later, has begun
    wait_until_it_holds_a_unit(other)
    os.kill(other, signal.SIGKILL)
    process.send_signal(signal.SIGCONT)
    printed, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert printed.count("distilled set") == 1
    assert "warning: process 1 ended with status -9, and the others did its part" in said
    assert contents(tmp_path / "set") == of_one_process(squares, tmp_path / "one", 100, 8)


@pytest.mark.parametrize("started_by", ["torchrun", "SLURM"])
def test_processes_started_by_torchrun_or_slurm_share_a_set(started_by, start, squares, tmp_path):
    def variables(rank):
        if started_by == "torchrun":
            return TORCHRUN | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return SLURM | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}

    both = [start("--devices", "2", "--num_inference_steps", "4", **variables(rank)) for rank in (0, 1)]
    (first, said), (second, nothing) = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said + nothing
    assert (first.count("distilled set"), second) == (1, "")
    assert contents(tmp_path / "set") == of_one_process(squares, tmp_path / "one", 4)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_told_to_stop_ends_at_once_with_its_other_processes(number, start, tmp_path):
    process = start("--devices", "2", "--num_inference_steps", "1000", "--ipc", "200")
    other = other_of(process)
    wait_until_it_holds_a_unit(other)
    while not list(tmp_path.glob("set.partial/*/class-*.safetensors")):
        time.sleep(0.05)
    made = len(list(tmp_path.glob("set.partial/*/class-*.safetensors")))
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    if number == signal.SIGINT:
        assert "Stopped. What is done so far is kept: the same command goes on from there." in said
    assert "Traceback" not in said
    with pytest.raises(ProcessLookupError):
        os.kill(other, 0)
    assert made <= len(list(tmp_path.glob("set.partial/*/class-*.safetensors"))) <= made + 1  # one may just have ended
    assert not (tmp_path / "set").exists()


def test_devices_that_are_not_there_are_named(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    cores = os.cpu_count()
    with pytest.raises(InputError, match=f"`devices` is {cores + 1}; this machine has {cores}"):
        on_all_devices(cores + 1, 1).__enter__()
    with pytest.raises(InputError, match="`num_nodes` is 0; it must be at least 1"):
        on_all_devices(1, 0).__enter__()


def test_another_number_of_processes_than_was_started_is_refused(monkeypatch):
    for name, value in (TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"`devices` is 1 and `num_nodes` 1: .* does not match the world size \(2\)"):
        on_all_devices(1, 1).__enter__()
    with on_all_devices("auto", 1) as first:
        assert first


def test_what_another_process_warns_of_is_told_once(monkeypatch, capfd):
    start = subprocess.Popen

    def another(command, **options):
        return start(["sh", "-c", "printf 'warning: the class of cats is small\\nwarning: so it is\\n' >&2"], **options)

    def command():
        with on_all_devices(2):
            warnings.warn(InputWarning("so it is"), stacklevel=1)

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(subprocess, "Popen", another)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *told: print(warnings.formatwarning(*told[:4]), end="", file=sys.stderr)
        to_the_user(command)
    assert capfd.readouterr().err == "warning: so it is\nwarning: the class of cats is small\n"
