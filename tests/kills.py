"""Distil in processes that are killed at random points; `python -m tests.kills PIPELINE KILLS PROCESSES SEED`.

It prints what happened as JSON. Random weights: it is about files, not pictures.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import d4m_plugin.assembling as assembling
import d4m_plugin.distillation as distillation
from d4m_plugin import LatentDiffusion, Recipe, distill
from tests.toys import Squares

CLASSES = tuple("abcdef")
RECIPE = Recipe(ipc=4, prototypes=2, num_inference_steps=4)
EXITED = os.WEXITED | os.WNOHANG | os.WNOWAIT
STAGES = ("encode", "cluster", "synthesise", "write")


def distil_and_note(output: Path, log: Path) -> None:
    """Distil, and append a line to the log as each unit begins: the process, the stage and the unit."""
    number = f"{os.getpid()}"

    def noting(module: Any, function: str, stage: str, unit: Callable[..., str]) -> None:
        original = getattr(module, function)

        def noted(*arguments: Any, **options: Any) -> Any:
            with log.open("a") as file:
                file.write(f"{number} {stage} {unit(*arguments)}\n")
            return original(*arguments, **options)

        setattr(module, function, noted)

    noting(LatentDiffusion, "encode", "encode", lambda _, pixels: str(pixels.float().mean().item()))
    noting(distillation, "cluster", "cluster", lambda latents, k, seed: str(seed))
    noting(distillation, "synthesise", "synthesise", lambda wanted, *_: str(wanted[0]).replace(" ", ""))
    noting(assembling, "write_parquet", "write", lambda *_: "set")
    distill(Squares(6, CLASSES), RECIPE, output=output)


def start(output: Path, log: Path) -> int:
    """Return the id of a new process that distils."""
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            distil_and_note(output, log)
            os._exit(0)
        except BaseException as error:
            print(json.dumps({"error": repr(error)}), flush=True)
            os._exit(1)
    return child


def contents(folder: Path) -> dict[str, Any]:
    """Return every file's bytes, but for the times that d4m.json tells."""
    found: dict[str, Any] = {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    (name,) = (name for name in found if name.endswith("/d4m.json"))
    record = json.loads(found.pop(name))
    return found | {"record": {name: value for name, value in record.items() if name != "seconds"}}


def main(pipeline: str, kills: int, processes: int, seed: int) -> dict[str, Any]:
    """Kill as many processes as asked for, some in each stage, and compare each set with an unkilled one."""
    torch.set_num_threads(1)
    Squares.diffusion, distillation.BLOCK = pipeline, 4
    model = LatentDiffusion(pipeline)
    distillation.open_model = lambda *_: model  # once, for all processes
    draw = random.Random(seed)
    killed_at: dict[str, int] = dict.fromkeys(("before", *STAGES), 0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["D4M_CACHE"] = str(folder / "cache")
        os.waitpid(start(folder / "whole", folder / "whole.log"), 0)
        whole = contents(folder / "whole")
        sets = same = left = most_redone = 0

        def wanted() -> bool:
            return sum(killed_at.values()) < kills or not all(killed_at[stage] for stage in STAGES)

        while wanted():
            output, log = folder / f"set-{sets}", folder / f"{sets}.log"
            sets += 1
            log.touch()
            living = [start(output, log) for _ in range(processes)]
            while living:
                victim = draw.choice(living)
                if wanted():
                    stage = min(STAGES, key=lambda stage: (killed_at[stage], draw.random()))
                    begun = 1 if stage == "write" else draw.randrange(1, 4)  # a process writes one set
                    while (
                        log.read_text().count(f"{victim} {stage}") < begun
                        and os.waitid(os.P_PID, victim, EXITED) is None
                    ):
                        time.sleep(0.001)
                    time.sleep(draw.uniform(0, 0.01 if stage == "write" else 0.03))
                    os.kill(victim, signal.SIGKILL)
                status = os.waitpid(victim, 0)[1]
                living.remove(victim)
                if os.WIFSIGNALED(status):
                    lines = [line.split() for line in log.read_text().splitlines()]
                    stages = [stage for process, stage, _ in lines if process == str(victim)]
                    killed_at[stages[-1] if stages else "before"] += 1
                    living.append(start(output, log))
            same += contents(output) == whole
            most_redone = max(most_redone, redone(log.read_text()))
            left += len(list(folder.glob("*.partial")))
    return {
        "killed at": killed_at,
        "sets": sets,
        "same to the byte": same,
        "left behind": left,
        "most units that a kill lost": most_redone,
    }


def redone(log: str) -> int:
    """Return the most units of one stage, of one killed process, that another process began again."""
    began: dict[tuple[str, str], list[str]] = {}
    for process, stage, unit in map(str.split, log.splitlines()):
        began.setdefault((stage, unit), []).append(process)
    lost: dict[tuple[str, str], int] = {}
    for (stage, _), processes in began.items():
        for process in processes[:-1]:
            lost[process, stage] = lost.get((process, stage), 0) + 1
    return max(lost.values(), default=0)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], *map(int, sys.argv[2:5]))))
