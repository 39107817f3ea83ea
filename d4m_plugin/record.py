"""What d4m.json tells of a distilled set, and how it is read: anyone may have written it."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from d4m_plugin.cache import written_whole
from d4m_plugin.checking import content_of, read_json
from d4m_plugin.errors import InputError
from d4m_plugin.recipe import ResolvedRecipe
from d4m_plugin.units import in_turn

FORMAT = 4  # of a set's folder; another one is not read


class AnyFormat(TypedDict):
    """What d4m.json tells in every format."""

    format: int


SourceRecord = TypedDict(
    "SourceRecord",
    {
        "name": str,
        "class": str,
        "arguments": dict[str, Any],
        "hub_id": str | None,
        "license": str,
        "citation": str,
        "fingerprint": str,
        "classes": list[str],
        "skipped": list[str],
    },
)


class ModelRecord(TypedDict):
    """The diffusion model."""

    hub_id: str | None
    digest: str | None
    license: str


class LabelsRecord(TypedDict):
    """The teacher whose logits are stored, and how it did."""

    teacher: str
    tried: str


class ResultRow(TypedDict):
    """What a card says of some trainings."""

    student: str
    labels: str
    arm: str
    images: int
    bytes: int | None
    mean: float | None
    std: float | None
    diverged: list[int]


class ResultsProtocol(TypedDict):
    """What a card says all trainings have in common."""

    seeds: int
    steps: int
    batch_size: int
    learning_rates: list[float]
    lr_smoothing: float
    teacher: str


class ResultsRecord(TypedDict):
    """What `d4m evaluate` found."""

    caution: str  # what to know before the verdicts; mostly nothing
    verdicts: dict[str, str | None]
    table: list[ResultRow]
    protocol: ResultsProtocol


class Record(TypedDict):
    """All that d4m.json must or may tell; it may tell more."""

    fingerprint: str
    recipe: dict[str, Any]  # of a ResolvedRecipe
    source: SourceRecord
    model: ModelRecord
    checksums: dict[str, str]
    labels: NotRequired[LabelsRecord]
    results: NotRequired[ResultsRecord]


class NewRecord(Record):
    """What d4m.json tells of a set that was just made."""

    format: int
    fewer_prototypes: dict[str, int]  # of the labels that have fewer than the recipe says
    versions: dict[str, str]
    seconds: dict[str, float]  # of each stage


def read_record(folder: Path) -> Record:
    """Return the d4m.json of a set's folder.

    Raises:
        InputError: where it cannot be read, is of another format, or tells what no set can have been made by.
    """
    file = folder / "d4m.json"
    content = content_of(file)
    found = read_json(content, AnyFormat, repr(str(file)))["format"]
    if found != FORMAT:
        raise InputError(f"{str(folder)!r} is of format {found}, not {FORMAT}; use the d4m-plugin that wrote it.")
    record: Record = read_json(content, Record, repr(str(file)))
    options = {field.name for field in dataclasses.fields(ResolvedRecipe)}
    if differs := sorted(options ^ record["recipe"].keys()):
        what = "lacks" if differs[0] in options else "has"
        raise InputError(f"{str(file)!r} is damaged or edited, or of another d4m-plugin: recipe {what} {differs[0]!r}.")
    try:
        ResolvedRecipe(**record["recipe"])
    except InputError as error:
        raise InputError(f"{str(file)!r} is damaged or edited: {error}") from error
    if len(record["source"]["classes"]) < 2:
        raise InputError(f"{str(file)!r} is damaged or edited: source.classes has fewer than two.")
    return record


def write_record(record: Record, folder: Path) -> None:
    """Put a record in place of the d4m.json of a set's folder; readers see the one or the other."""
    with written_whole(folder / "d4m.json") as path:
        path.write_bytes(encoded(record))


@contextmanager
def record_in_turn(folder: Path) -> Iterator[None]:
    """Change a set's folder in one process at a time; the lock lies beside it."""
    with in_turn(folder.with_name(f".{folder.name}"), "changes the set"):
        yield


def encoded(record: Record) -> bytes:
    """Return what d4m.json holds of a record."""
    return json.dumps(record, indent=2).encode()
