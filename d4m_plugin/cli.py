"""The command line: `lightning`, `d4m` and `python -m d4m_plugin` are one program.

`fit`, `validate`, `test` and `predict` are LightningCLI's, with our defaults; the other commands are functions.
Libraries are imported by the command that needs them, so that help is quick.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

from d4m_plugin.errors import InputError

LIGHTNING_COMMANDS = {
    "fit": "distil a dataset, or find it distilled, and train a model on it",
    "validate": "measure a checkpoint on the real validation images",
    "test": "measure a checkpoint on the real test images",
    "predict": "label the real test images with a checkpoint",
}
FUNCTION_COMMANDS = {
    "distill": "distil a dataset alone",
    "pretrain": "train a small latent diffusion pipeline on a dataset",
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
        _to_the_user(lambda: _call(args[0], args[1:]))
    elif args[0] in LIGHTNING_COMMANDS or args[0].startswith("-"):
        _to_the_user(_lightning_cli)
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


def _to_the_user(run: Callable[[], None]) -> None:
    try:
        run()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _call(command: str, args: list[str]) -> None:
    from jsonargparse import ArgumentParser

    import d4m_plugin.sources  # noqa: F401  # so that sources are found by their short names

    parser = ArgumentParser(prog=f"d4m {command}", description=FUNCTION_COMMANDS[command])
    parser.add_argument("--config", action="config", help="a YAML file of the options")
    if command == "pretrain":
        from d4m_plugin.pretraining import pretrain

        parser.add_function_arguments(pretrain)
        config = parser.instantiate_classes(parser.parse_args(args))
        config.pop("config", None)
        print(f"Wrote {pretrain(**vars(config))}")
    else:
        from d4m_plugin.distillation import distill_command

        parser.add_function_arguments(distill_command)
        config = parser.instantiate_classes(parser.parse_args(args))
        config.pop("config", None)
        dataset = distill_command(**vars(config))
        print(table({"Distilled set": dataset.root, "Preview": dataset.preview}))


def _lightning_cli() -> None:
    from d4m_plugin.lightning_cli import D4MCLI

    D4MCLI()


def table(rows: dict[str, Any]) -> str:
    """Return rows of a name and a value as text, the names aligned."""
    width = max(len(name) for name in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items())
