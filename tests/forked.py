"""Pythons that begin in a moment: forks of one, for each worker of the tests, that has imported what takes seconds."""

import multiprocessing
import os
import runpy
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

FORKSERVER = multiprocessing.get_context("forkserver")  # ends with the worker
IMPORTED = [
    "d4m_plugin.lightning_cli",
    "d4m_plugin.distillation",
    "d4m_plugin.evaluation.evaluate",
    "d4m_plugin.pushing",
    "datasets",
    "diffusers.pipelines.auto_pipeline",
    "tests.toys",
]


class Forks:
    """Starts forks.

    Args:
        environment: what is read at import, and so is the same for all of them.
    """

    def __init__(self, environment):
        self.environment = environment
        FORKSERVER.set_forkserver_preload(IMPORTED)
        with patch.dict(os.environ, self.with_others({}), clear=True):
            forkserver.ensure_running()
        ready = FORKSERVER.Process(target=int)  # so that no test's time limit holds for the imports
        ready.start()
        ready.join()

    def with_others(self, environment):
        """Return a whole environment, without what a user's own tells of a Hub."""
        others = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return others | self.environment | environment

    def start(self, *words, folder, **environment):
        """Start `python WORDS`, a script or a module with its arguments; its output goes to files in a folder."""
        return _Fork(list(map(str, words)), Path(folder), self.with_others(environment))

    def run(self, *words, folder, **environment):
        """Run `python WORDS` to its end, as `subprocess.run` does."""
        fork = self.start(*words, folder=folder, **environment)
        try:
            printed, said = fork.communicate(timeout=300)
        finally:
            fork.kill()
        return subprocess.CompletedProcess(words, fork.returncode, printed, said)


class _Fork:
    """As subprocess.Popen is, in a session of its own."""

    def __init__(self, words, folder, environment):
        self.streams = [folder / name for name in ("stdout.txt", "stderr.txt")]
        self.process = FORKSERVER.Process(target=_run, args=(words, environment, os.getcwd(), self.streams))
        self.process.start()
        self.pid, self.kill = self.process.pid, self.process.kill

    @property
    def returncode(self):
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def communicate(self, timeout=None):
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.streams[0]), timeout)
        return tuple(stream.read_text() for stream in self.streams)


def _run(words, environment, folder, streams):
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in enumerate(streams, 1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
