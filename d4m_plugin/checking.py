"""Whether a value is what its annotation says: an option of Python code, or JSON and YAML that others wrote."""

import json
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from d4m_plugin.errors import InputError

LARGEST = 2**63  # of whole numbers, which tensors and parquet hold in 64 bits
WORDS = {
    bool: "true or false",
    int: "a whole number below 2^63",
    float: "a number",
    str: "text",
    NoneType: "null",
    Any: "what JSON can hold",
}
JSON = bool | int | float | str | list[Any] | dict[str, Any] | None

_surrogate = re.compile("[\ud800-\udfff]")  # half a character, which JSON can hold and UTF-8 cannot
_shorten = reprlib.Repr()
_shorten.maxstring, _shorten.maxlist, _shorten.maxdict, _shorten.maxlevel = 200, 4, 2, 1  # a path is whole


def check_least(least: int, /, **options: float | None) -> None:
    """Refuse numbers below the least that works, by the options' names; None is a default.

    Raises:
        InputError: where there is one.
    """
    for name, value in options.items():
        if value is not None and value < least:
            raise InputError(f"`{name}` is {value}; it must be at least {least}.")


def check_above_zero(**options: float) -> None:
    """Refuse numbers that are not above zero, by the options' names.

    Raises:
        InputError: where there is one.
    """
    for name, value in options.items():
        if not value > 0:
            raise InputError(f"`{name}` is {value}; it must be above 0.")


def fault_of(value: Any, expected: Any, name: str) -> str | None:
    """Return what is wrong with a value and what would be right; None where it is as expected.

    A whole number is a number, but true and false are none; text can be written as UTF-8.

    Args:
        value: anything.
        expected: an annotation made of the types in WORDS, Literal, unions, list, dict and TypedDict, whose further
            keys may hold anything.
        name: what the sentence calls the value, "" for a whole file.
    """
    origin, parts = get_origin(expected), get_args(expected)
    if origin in (Union, UnionType):
        right = any(fault_of(value, part, name) is None for part in parts)
    elif origin is Literal:
        right = isinstance(value, str) and value in parts
    elif origin is list and isinstance(value, list | tuple):
        return _first(fault_of(each, parts[0], f"{name}[{place}]") for place, each in enumerate(value))
    elif origin is dict and isinstance(value, dict):
        keys = _first(fault_of(key, parts[0], f"a key of {name}") for key in value)
        return keys or _first(fault_of(each, parts[1], f"{name}[{shown(key)}]") for key, each in value.items())
    elif is_typeddict(expected) and isinstance(value, dict):
        if missing := sorted(expected.__required_keys__ - value.keys()):
            return f"{name or 'it'} has no {missing[0]!r}"
        hints = get_type_hints(expected)
        return _first(fault_of(value[key], hints[key], f"{name}.{key}".lstrip(".")) for key in hints if key in value)
    elif expected is Any:
        return fault_of(value, JSON, name)
    elif expected is float:
        right = isinstance(value, float) or _is_whole(value)
    elif expected is int:
        right = _is_whole(value)
    elif expected is str:
        right = isinstance(value, str) and not _surrogate.search(value)
    else:
        right = expected in (bool, NoneType) and isinstance(value, expected)
    return None if right else f"{name or 'it'} is {shown(value)}; it must be {_in_words(expected)}"


def read_json(content: bytes, expected: Any, name: str) -> Any:
    """Return what JSON holds.

    Args:
        content: of a file or of a line of one.
        expected: what it must be, as for `fault_of`.
        name: what an error calls the JSON.

    Raises:
        InputError: where it is no JSON, or other than expected.
    """
    try:
        value = json.loads(content)
        fault = fault_of(value, expected, "")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is damaged ({error}).") from error
    if fault:
        raise InputError(f"{name} is damaged or edited: {fault}.")
    return value


def content_of(file: Path) -> bytes:
    """Return what a file holds.

    Raises:
        InputError: where it cannot be read.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{str(file)!r} cannot be read ({error.strerror}).") from error


def check_fields(options: Any) -> None:
    """Check the fields of a dataclass by their annotations.

    Raises:
        InputError: where one has a value of another type.
    """
    for name, expected in get_type_hints(type(options)).items():
        if fault := fault_of(getattr(options, name), expected, f"`{name}`"):
            raise InputError(f"{fault}.")


def shown(value: Any) -> str:
    """Return a value for an error, shortened."""
    return _shorten.repr(value)


def _first(faults: Iterable[str | None]) -> str | None:
    return next(filter(None, faults), None)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def _in_words(expected: Any) -> str:
    parts = get_args(expected)
    if get_origin(expected) in (Union, UnionType):
        return " or ".join(map(_in_words, parts))
    if get_origin(expected) is Literal:
        return " or ".join(map(str, parts))
    if get_origin(expected) is list:
        return f"a list of {_in_words(parts[0])}"
    if get_origin(expected) is dict or is_typeddict(expected):
        return "a mapping" if not parts else f"a mapping from {_in_words(parts[0])} to {_in_words(parts[1])}"
    return WORDS[expected]
