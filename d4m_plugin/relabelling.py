"""Store a teacher's outputs with a distilled set, so that students learn from them without the teacher."""

from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from d4m_plugin.cache import checksum, make_writable, written_whole
from d4m_plugin.card import write_card
from d4m_plugin.devices import default_device
from d4m_plugin.distilled import DistilledDataset, columns_of, shards
from d4m_plugin.errors import InputError
from d4m_plugin.hub import without_folders
from d4m_plugin.progress import Progress
from d4m_plugin.record import LabelsRecord, read_record, record_in_turn, write_record
from d4m_plugin.screening import readable_source
from d4m_plugin.sources import Source
from d4m_plugin.sources.images import squares_of
from d4m_plugin.teachers import Teacher, name_of, tried_teacher

BATCH = 100  # images


def relabel(
    folder: Path,
    source: Source | None = None,
    teacher: str = "auto",
    config_name: str | None = None,
    skip_bad_images: bool = False,
    cache_dir: Path | None = None,
) -> DistilledDataset:
    """Write a teacher's logits, float16, as the column `logits` of a distilled set, in place of any that are there.

    Students learn from them with `--data.set_folder FOLDER --matching.teacher stored`.

    Args:
        folder: the set's.
        source: the real images that it was distilled from; scikit-learn's digits by default.
        teacher: as TeacherMatching takes it, but one, and not `stored`.
        config_name: which of several sets in the folder.
        skip_bad_images: leave out real images that cannot be read, of those that a teacher is tried on or learns from.
        cache_dir: as for D4MDataModule.

    Returns:
        The set.

    Raises:
        InputError: where the folder is no distilled set or one of other classes, or the teacher does not suit it.
    """
    source = readable_source(source, skip_bad_images, cache_dir, num_workers=0)
    dataset = DistilledDataset(folder, config_name)
    if dataset.classes != list(source.classes):
        raise InputError(f"`folder` is {str(folder)!r}, whose classes are not those of {source.name}.")
    make_writable(dataset.folder, "folder")
    write_card(Path(dataset.root), dataset.folder.name, dataset.metadata)  # now it can still be refused
    loaded, tried = tried_teacher(teacher, source, cache_dir, default_device())
    logits = _logits(loaded, dataset)
    with record_in_turn(dataset.folder):
        _write(dataset, logits, {"teacher": without_folders(name_of(teacher)), "tried": tried})
    return DistilledDataset(folder, config_name)


def _write(dataset: DistilledDataset, logits: Tensor, labels: LabelsRecord) -> None:
    """Put logits in a set's files; all are written aside before the first takes its place."""
    record, files = read_record(dataset.folder), shards(dataset.folder)
    record.pop("labels", None)
    schema, start = columns_of(dataset.classes, with_logits=True).arrow_schema, 0
    with ExitStack() as written:
        for file in files:
            table = pq.read_table(file)
            own = logits[start : start + len(table)]
            columns = {name: table[name] for name in table.column_names if name != "logits"}
            columns["logits"] = pa.FixedSizeListArray.from_arrays(own.flatten().numpy(), len(dataset.classes))
            pq.write_table(pa.table(columns, schema=schema), written.enter_context(written_whole(file)))
            start += len(table)
        write_record(record, dataset.folder)  # so that no teacher is named meanwhile
    record["labels"] = labels
    record["checksums"] |= {file.name: checksum(file) for file in files}
    write_record(record, dataset.folder)
    write_card(Path(dataset.root), dataset.folder.name, record)


def _logits(teacher: Teacher, dataset: DistilledDataset) -> Tensor:
    """Return a teacher's logits of a set's images, float16, shape (N, classes)."""
    device = default_device()
    batches = []
    starts = range(0, len(dataset), BATCH)
    for start in Progress("Labelling", len(starts), " batches", iterable=starts):
        images = range(start, min(start + BATCH, len(dataset)))
        pixels = squares_of(dataset, teacher.image_size, chosen=images)
        batches.append(teacher(pixels.to(device) / 255).half().cpu())
    return torch.cat(batches)
