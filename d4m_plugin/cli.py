"""The command line: `lightning`, `d4m` and `python -m d4m_plugin` are one program.

`fit`, `validate`, `test` and `predict` are LightningCLI's, with our defaults; the other commands are functions.
Libraries are imported by the command that needs them, so that help is quick.
"""

import itertools
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from d4m_plugin.console import OneSentenceErrors, log_to, table, to_the_user

LIGHTNING_COMMANDS = {
    "fit": "distil a dataset, or find it distilled, and train a model on it",
    "validate": "measure a checkpoint on the real validation images",
    "test": "measure a checkpoint on the real test images",
    "predict": "label the real test images with a checkpoint",
}
FUNCTION_COMMANDS = {
    "preview": "draw a few images as a recipe would make them",
    "distill": "distil a dataset alone",
    "evaluate": "tell whether a distilled set is better than random real images",
    "compare": "judge several distilled sets alike, whatever method made them",
    "sweep": "try values of the recipe's options, and draw how accuracy depends on them",
    "relabel": "store a teacher's logits with a distilled set",
    "push": "upload a distilled set to the Hugging Face Hub",
    "pretrain": "train a small latent diffusion pipeline on a dataset",
    "cache": "list, verify or remove what is kept of sets, latents and teachers",
}
COMMANDS = LIGHTNING_COMMANDS | FUNCTION_COMMANDS


def d4m() -> None:
    """Run a command line of ours; print an InputError as one sentence and exit with status 2."""
    args = sys.argv[1:]
    sys.path.append(os.getcwd())  # a script's path lacks it, and `--model my_module.MyModule` lies there
    if not args or args[0] in ("-h", "--help"):
        print(_help())
    elif args[0] == "--version":
        from importlib.metadata import version

        print(f"d4m-plugin {version('d4m-plugin')}")
    elif args[0] in FUNCTION_COMMANDS:
        to_the_user(lambda: _call(args[0], args[1:]))
    elif args[0] in LIGHTNING_COMMANDS or args[0].startswith("-"):
        to_the_user(_lightning_cli)
    else:
        sys.exit(f"d4m: there is no command {args[0]!r}; the commands are {', '.join(COMMANDS)}.")


def lightning() -> None:
    """Run `lightning`: ours, or the command of the lightning-sdk package where the word is not ours."""
    word = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if word not in COMMANDS and not word.startswith("-"):
        try:
            from lightning_sdk.cli.entrypoint import main_cli
        except ImportError:
            pass
        else:
            main_cli()
            return
    d4m()


def _help() -> str:
    lines = [f"  {name:<10}{what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: d4m COMMAND [OPTIONS]   (also: lightning, python -m d4m_plugin)",
            "",
            "Distil an image dataset with latent diffusion (D4M) and train any Lightning model on the result.",
            "",
            *lines,
            "",
            "Start with `lightning fit --data D4MDataModule`. Options of a command: `d4m COMMAND --help`.",
        ]
    )


def _call(command: str, args: list[str]) -> None:
    from jsonargparse import ArgumentParser

    from d4m_plugin.commands import MANY, POSITIONAL, SHARED, function_of, rows_of
    from d4m_plugin.processes import on_all_devices
    from d4m_plugin.progress import is_first

    if command in MANY:
        words, others = _apart(args)
        if words:
            args = [*words[: MANY[command]], json.dumps(words[MANY[command] :]), *others]

    class Parser(OneSentenceErrors, ArgumentParser):
        """jsonargparse's, with our errors."""

    parser = Parser(prog=f"d4m {command}", description=FUNCTION_COMMANDS[command])
    parser.add_argument("--config", action="config", help="a YAML file of the options")
    parser.add_argument("--log_file", type=Path | None, help="a file to which progress and warnings are added")
    function = function_of(command)
    parser.add_function_arguments(function, as_positional=command in POSITIONAL)
    if command in SHARED:
        parser.add_function_arguments(on_all_devices)
    given = vars(parser.instantiate(parser.parse_args(args)))
    options: dict[str, Any] = {
        name: value.expanduser() if isinstance(value, Path) else value for name, value in given.items()
    }
    options.pop("config")
    if log_file := options.pop("log_file"):
        log_to(log_file)
    devices, num_nodes = options.pop("devices", 1), options.pop("num_nodes", 1)
    alone = command not in SHARED or options.get("dry_run")
    with nullcontext(is_first()) if alone else on_all_devices(devices, num_nodes) as first:
        told = rows_of(function(**options)) if first or not alone else {}
    if first:
        print(table(told))


def _apart(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words that stand alone, and the options, each with its value."""
    words: list[str] = []
    options: list[str] = []
    given = iter(args)
    for each in given:
        if not each.startswith("-"):
            words.append(each)
        elif "=" in each:
            options.append(each)
        else:
            options += [each, *itertools.islice(given, 1)]
    return words, options


def _lightning_cli() -> None:
    from d4m_plugin.lightning_cli import D4MCLI

    D4MCLI()
