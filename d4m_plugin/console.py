"""What the command line tells the user: tables, warnings of one line, and errors of one sentence."""

import io
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from pickle import UnpicklingError
from types import FrameType
from typing import Any, NoReturn

from d4m_plugin.cache import refusal_of
from d4m_plugin.errors import WARNING, InputError, InputWarning

LOG = logging.getLogger("d4m_plugin")
LOG.addHandler(logging.NullHandler())  # else Python says its warnings a second time


def log_to(file: Path) -> None:
    """Have progress and warnings added to a file.

    Raises:
        InputError: where it cannot be written.
    """
    try:
        handler = logging.FileHandler(file, encoding="utf-8")
    except OSError as error:
        raise InputError(f"`log_file` is {str(file)!r}, which cannot be written ({error.strerror}).") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)


def to_the_user(run: Callable[[], None]) -> None:
    """Run a command; end with status 2 and one sentence where the user can mend it, with 130 at Ctrl-C."""
    warnings.formatwarning = _in_one_line
    _told.clear()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr has it: what the terminal lacks is no error
    try:
        run()
    except KeyboardInterrupt:
        print(
            "\nStopped. What is done so far is kept: the same command goes on from there.", file=sys.stderr, flush=True
        )
        os._exit(130)  # now, whatever threads and other processes are at
    except Exception as error:
        sentence = _sentence_of(error)
        if sentence is None:
            raise
        fail(sentence)
    finally:
        warnings.formatwarning = _in_full


_in_full = warnings.formatwarning
_told: set[str] = set()  # warnings, each of which is said once, whichever stages and processes give it


# What Lightning says of options that cannot work, where its error is of no kind of its own.
LIGHTNINGS = ("Training with multiple optimizers", "Early stopping conditioned on metric", "`val_check_interval` (")

# What jsonargparse says of a class that cannot be made, such as a logger whose package is not here.
UNMADE = re.compile(r"Does not validate.*?Problem with given class_path ('.*?'):\n\s*(.*?)\n", re.DOTALL)


def _sentence_of(error: Exception) -> str | None:
    """Return what to tell of an error that the user can mend; None of any other."""
    if type(error).__name__ == "MisconfigurationException" or str(error).strip().startswith(LIGHTNINGS):
        return str(error)
    if made := UNMADE.match(str(error)):
        return f"{made[1]} cannot be made: {made[2]}"
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    cut_off = isinstance(error, EOFError) or str(error).startswith("PytorchStreamReader")
    if isinstance(error, UnpicklingError) or (cut_off and any(_is_torchs_load(frame) for frame in frames)):
        return (
            "the checkpoint is damaged, or holds more than tensors: it is not read, since that could run code; "
            "`weights_only: false` lets a `ckpt_path` that you trust."
        )
    restoring = any(frame.f_code.co_name == "restore_model" for frame in frames)
    if restoring and str(error).startswith("Error(s) in loading state_dict"):  # a module may load others of its own
        return "`ckpt_path` names a checkpoint of another model, or of another number of classes or image size."
    if refusal := refusal_of(error):
        return refusal
    cause = _input_error(error)
    return None if cause is None else str(cause).rpartition("InputError: ")[2]  # a loader's worker sends its traceback


def _is_torchs_load(frame: FrameType) -> bool:
    return frame.f_code.co_name == "load" and frame.f_globals.get("__name__") == "torch.serialization"


def _in_one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Say a warning about the user's data without the line of code that gave it."""
    if issubclass(category, InputWarning):
        told = f"{WARNING}{printable(str(message))}"
        if told in _told:
            return ""
        _told.add(told)
        LOG.warning(told)
        return f"{told}\n"
    return _in_full(message, category, filename, lineno, line)


def fail(sentence: str) -> NoReturn:
    """Say what is wrong, and exit with status 2."""
    told = f"error: {printable(' '.join(sentence.split()))}"
    print(told, file=sys.stderr)
    LOG.error(told)
    sys.exit(2)


def printable(text: str) -> str:
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
    _option_string_actions: dict[str, Any]

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse a file of options that is no text, such as a checkpoint."""
        try:
            return super().parse_args(*args, **kwargs)  # type: ignore[misc]  # mypy sees no mixin's base
        except UnicodeDecodeError:
            fail("`config` names a file that is no text; name a YAML file of options (a checkpoint is `ckpt_path`).")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the option and what is wrong with it, and exit with status 2."""
        message += _what_is_meant(message, self._option_string_actions)
        if not self.exit_on_error:  # the parser of a nested class: the outer one adds the rest of the option's name
            super().error(message, ex)  # type: ignore[misc]  # jsonargparse's parser: mypy sees no mixin's base
        fail(str(_input_error(ex) or one_sentence(message)))


def _what_is_meant(message: str, options: Iterable[str]) -> str:
    """Return what a message of an unknown option lacks: the option of that name elsewhere, or the one most like it."""
    unknown = re.search(r"(?:unrecognized arguments: --|Option ')([^\s=']+)", message)
    if not unknown or message.endswith("meant?)"):
        return ""
    names = [option.removeprefix("--") for option in options]
    name = unknown[1].rpartition(".")[2]
    meant = [each for each in names if each.rpartition(".")[2] == name] or get_close_matches(unknown[1], names)
    return f" (is {meant[0]} meant?)" if meant else ""


# What jsonargparse says beside the fact, on lines of their own.
_AROUND_THE_FACT = re.compile(
    r"Parser key|Problem with given class_path|Does not validate|Subtypes:|Errors:|Expected a <class 'NoneType'>"
    r"|Given value|Expected a path but"
)


_EXPECTED = re.compile(
    r"Expected an? (?:<class '(?:[\w.]*\.)?(\w+)'>|typing\.Literal\[(.*?)\]|tuple with (\d+) elements)"
)
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "dict": "a mapping",
    "list": "a list",
    "tuple": "a list",
    "Sequence": "a list",
    "NoneType": "null",
}


def one_sentence(message: str) -> str:
    """Return the option's full name and the fact from a message of jsonargparse, which nests one in the other."""
    option = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    lines = [line.strip(" -") for line in message.splitlines()]
    facts = [line for line in lines if line and not _AROUND_THE_FACT.match(line)]
    if not option or not facts:
        return " ".join(lines)
    if missing := re.match("the following arguments are required: (.*)", facts[-1]):
        return f"`{option}.{missing[1]}` is missing; name it too."
    kinds, *values = re.split(r"(?:Got|Given) value: (.*)", message.rpartition("Parser key")[2])
    if values and _EXPECTED.match(facts[-1]):
        right = [
            f"a list of {count}" if count else _KINDS.get(kind, kind) or (f"one of {words}" if ", " in words else words)
            for kind, words, count in _EXPECTED.findall(kinds)
        ]
        return f"`{option}` is {values[0]}; it must be {' or '.join(right)}."
    unknown = re.match(r"Expected a dot import path string: (.*)", facts[-1])
    if not unknown:
        return f"`{option}`: {facts[-1]}"
    known = f"one of {', '.join(_source_names())} or " if option.endswith("source") else ""
    return f"`{option}` is {unknown[1]!r}, which is no such class; name {known}a class by its import path."


def _source_names() -> list[str]:
    from d4m_plugin import sources

    offered = {name: getattr(sources, name) for name in sources.__all__}
    return [name for name, kind in offered.items() if issubclass(kind, sources.Source) and kind is not sources.Source]


def table(rows: dict[str, Any]) -> str:
    """Return rows of a name and a value as text, the names aligned."""
    width = max(len(name) for name in rows)
    return "\n".join(printable(f"  {name:<{width}}  {value}") for name, value in rows.items())
