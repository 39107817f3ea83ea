"""The command line: `lightning`, `d4m` and `python -m d4m_plugin` are one program.

`fit`, `validate`, `test` and `predict` are LightningCLI's, with our defaults; the other commands are functions.
Libraries are imported by the command that needs them, so that help is quick.
"""

import itertools
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from d4m_plugin.cache import refusal_of
from d4m_plugin.errors import InputError, InputWarning

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
LOG = logging.getLogger("d4m_plugin")
LOG.addHandler(logging.NullHandler())  # else Python says its warnings a second time
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
    warnings.formatwarning = _in_one_line
    try:
        run()
    except KeyboardInterrupt:
        print(
            "\nStopped. What is done so far is kept: the same command goes on from there.", file=sys.stderr, flush=True
        )
        os._exit(130)  # now, whatever threads and other processes are at
    except Exception as error:
        if type(error).__name__ == "MisconfigurationException":  # Lightning's for options that cannot work
            _fail(str(error))
        if type(error).__name__ == "UnpicklingError":  # torch's, of what Lightning gives it
            _fail("the checkpoint is damaged, or holds more than tensors: it is not read, since that could run code.")
        if refusal := refusal_of(error):
            _fail(refusal)
        cause = _input_error(error)
        if cause is None:
            raise
        _fail(str(cause).rpartition("InputError: ")[2].strip())  # a loader's worker sends its traceback along
    finally:
        warnings.formatwarning = _in_full


_in_full = warnings.formatwarning


def _in_one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Say a warning about the user's data without the line of code that gave it."""
    if issubclass(category, InputWarning):
        told = f"warning: {_printable(str(message))}"
        LOG.warning(told)
        return f"{told}\n"
    return _in_full(message, category, filename, lineno, line)


def _fail(sentence: str) -> NoReturn:
    told = f"error: {_printable(' '.join(sentence.split()))}"
    print(told, file=sys.stderr)
    LOG.error(told)
    sys.exit(2)


def _printable(text: str) -> str:
    """Return text as a terminal may show it: what others named may hold its commands."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _input_error(error: BaseException | None) -> InputError | None:
    """Return the InputError among an error's causes: jsonargparse wraps what a constructor raises."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__
    return error


class OneSentenceErrors:
    """Mix into a jsonargparse parser: what it cannot parse is said in one line, without usage."""

    exit_on_error: bool

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the option and what is wrong with it, and exit with status 2."""
        if not self.exit_on_error:  # the parser of a nested class: the outer one adds the rest of the option's name
            super().error(message, ex)  # type: ignore[misc]  # jsonargparse's, which this is mixed into
        _fail(str(_input_error(ex) or one_sentence(message)))


# What jsonargparse says beside the fact, on lines of their own.
_AROUND_THE_FACT = re.compile(
    r"Parser key|Problem with given class_path|Does not validate|Subtypes:|Errors:|Expected a <class 'NoneType'>"
    r"|Given value|Expected a path but"
)


def one_sentence(message: str) -> str:
    """Return the option's full name and the fact from a message of jsonargparse, which nests one in the other."""
    option = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    lines = [line.strip(" -") for line in message.splitlines()]
    facts = [line for line in lines if line and not _AROUND_THE_FACT.match(line)]
    if not option or not facts:
        return " ".join(lines)
    unknown = re.match(r"Expected a dot import path string: (.*)", facts[-1])
    if not unknown:
        return f"`{option}`: {facts[-1]}"
    known = f"one of {', '.join(_source_names())} or " if option.endswith("source") else ""
    return f"`{option}` is {unknown[1]!r}, which is no such class; name {known}a class by its import path."


def _source_names() -> list[str]:
    from d4m_plugin import sources

    offered = {name: getattr(sources, name) for name in sources.__all__}
    return [name for name, kind in offered.items() if issubclass(kind, sources.Source) and kind is not sources.Source]


def _call(command: str, args: list[str]) -> None:
    from jsonargparse import ArgumentParser

    from d4m_plugin.commands import FUNCTIONS, MANY, POSITIONAL, SHARED, rows_of
    from d4m_plugin.processes import on_all_devices

    words = list(itertools.takewhile(lambda word: not word.startswith("-"), args))
    if words and command in MANY:
        args = [*words[: MANY[command]], json.dumps(words[MANY[command] :]), *args[len(words) :]]

    class Parser(OneSentenceErrors, ArgumentParser):
        """jsonargparse's, with our errors."""

    parser = Parser(prog=f"d4m {command}", description=FUNCTION_COMMANDS[command])
    parser.add_argument("--config", action="config", help="a YAML file of the options")
    parser.add_argument("--log_file", type=Path | None, help="a file to which progress and warnings are added")
    parser.add_function_arguments(FUNCTIONS[command], as_positional=command in POSITIONAL)
    if command in SHARED:
        parser.add_function_arguments(on_all_devices)
    options = vars(parser.instantiate(parser.parse_args(args)))
    options.pop("config")
    if log_file := options.pop("log_file"):
        _log_to(log_file)
    devices, num_nodes = options.pop("devices", 1), options.pop("num_nodes", 1)
    with on_all_devices(1 if options.get("dry_run") else devices, num_nodes) as first:
        told = rows_of(FUNCTIONS[command](**options))
    if first:
        print(table(told))


def _log_to(file: Path) -> None:
    try:
        handler = logging.FileHandler(file, encoding="utf-8")
    except OSError as error:
        raise InputError(f"`log_file` is {str(file)!r}, which cannot be written ({error.strerror}).") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)


def _lightning_cli() -> None:
    from d4m_plugin.lightning_cli import D4MCLI

    D4MCLI()


def table(rows: dict[str, Any]) -> str:
    """Return rows of a name and a value as text, the names aligned."""
    width = max(len(name) for name in rows)
    return "\n".join(_printable(f"  {name:<{width}}  {value}") for name, value in rows.items())
