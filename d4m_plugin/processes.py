"""The processes of one command, one for each device: started here, or by torchrun or SLURM.

They share the work by files (d4m_plugin/units.py) and form no process group, in which one that died would stop the
others. So Lightning Fabric tells who started what, and its launcher, which joins them in one, is not used.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any, Literal

import torch

from d4m_plugin.checking import check_least
from d4m_plugin.errors import WARNING, InputError, InputWarning
from d4m_plugin.progress import is_first

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment

GRACE = 2.0  # seconds that a process has to end


@contextmanager
def on_all_devices(devices: int | Literal["auto"] = "auto", num_nodes: int = 1) -> Iterator[bool]:
    """Run the body in a process for each device, and tell each whether it is the first of all.

    Where neither torchrun nor SLURM has started processes, the others run the same command as this one. They end with
    it: when it is done, so is the work, and what they warned of is told. Where one of them fails, the rest do its part.

    Args:
        devices: of this machine; `auto`, all accelerators, or one process on a CPU.
        num_nodes: machines that run the command, which torchrun and SLURM know too.

    Raises:
        InputError: where there are not so many devices, or torchrun or SLURM has started another number of processes.

    Warns:
        InputWarning: where another process warned of something, or failed.
    """
    launcher = _launcher()
    there = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    count = (there or 1) if devices == "auto" else devices
    most = there or os.cpu_count() or 1
    started_here = launcher is None and "LOCAL_RANK" not in os.environ  # others may show each its own device alone
    if count < 1 or (started_here and count > most):
        raise InputError(f"`devices` is {devices}; this machine has {most}.")
    check_least(1, num_nodes=num_nodes)
    if launcher and (devices != "auto" or num_nodes > 1):
        try:
            launcher.validate_settings(count, num_nodes)
        except ValueError as error:
            raise InputError(f"`devices` is {devices} and `num_nodes` {num_nodes}: {error}") from error
    here = launcher.local_rank() if launcher else int(os.environ.get("LOCAL_RANK", 0))
    if there:
        torch.accelerator.set_device_index(here % there)
    elif count > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    others: list[_Other] = []
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        others += [_Other(number) for number in range(1, count if started_here else 1)]
        yield is_first()
        deadline = time.monotonic() + GRACE
        for other in others:
            other.wait(deadline)
    finally:
        for other in others:
            other.process.terminate()
        deadline = time.monotonic() + GRACE
        for other in others:
            other.end(deadline)
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _launcher() -> "ClusterEnvironment | None":
    """Return who has started this process, where it was torchrun or SLURM."""
    if not any(name.startswith(("TORCHELASTIC_", "SLURM_")) for name in os.environ):
        return None  # without Lightning, which takes seconds to import
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    try:
        for kind in (TorchElasticEnvironment, SLURMEnvironment):
            if kind.detect():
                return kind()
    except RuntimeError as error:  # of SLURM's variables
        raise InputError(str(error)) from error
    return None


def _stop(number: int, frame: Any) -> None:
    sys.exit(128 + number)


class _Other:
    """Another process of the same command, by its number on this machine."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        command = [sys.executable, "-P", "-m", "d4m_plugin", *sys.argv[1:]]  # -P: as of a script, its path first
        environment = os.environ | {"LOCAL_RANK": str(number)}
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=self.said)

    def wait(self, deadline: float) -> None:
        """Wait for its end until a moment; pass on its warnings, and tell of a failure by the last thing it said."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0, deadline - time.monotonic()))
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").splitlines()
        for line in lines:
            if line.startswith(WARNING):
                warnings.warn(line.removeprefix(WARNING), InputWarning, stacklevel=2)
        if status := self.process.returncode:
            *_, last = ["", *lines]
            sentence = f"process {self.number} ended with status {status}, and the others did its part: {last}"
            warnings.warn(sentence, InputWarning, stacklevel=2)

    def end(self, deadline: float) -> None:
        """End it where it still runs at a moment."""
        try:
            self.process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.said.close()
