"""Store a teacher's outputs with a distilled set, so that students learn from them without the teacher."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from d4m_plugin.cache import make_writable, written_whole
from d4m_plugin.card import write_card
from d4m_plugin.devices import default_device
from d4m_plugin.distilled import DistilledDataset, checksums, columns_of, shards
from d4m_plugin.errors import InputError
from d4m_plugin.hub import without_folders
from d4m_plugin.progress import Progress
from d4m_plugin.record import read_record, write_record
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

    record = read_record(dataset.folder)
    record.pop("labels", None)
    write_record(record, dataset.folder)  # so that no teacher is named meanwhile
    schema, start = columns_of(dataset.classes, with_logits=True).arrow_schema, 0
    for shard in shards(dataset.folder):
        table = pq.read_table(shard)
        own = logits[start : start + len(table)]
        columns = {name: table[name] for name in table.column_names if name != "logits"}
        columns["logits"] = pa.FixedSizeListArray.from_arrays(own.flatten().numpy(), len(dataset.classes))
        with written_whole(shard) as path:
            pq.write_table(pa.table(columns, schema=schema), path)
        start += len(table)
    record["labels"] = {"teacher": without_folders(name_of(teacher)), "tried": tried}
    record["checksums"] = {name: sum_ for name, sum_ in checksums(dataset.folder).items() if name != "d4m.json"}
    write_record(record, dataset.folder)
    write_card(Path(dataset.root), dataset.folder.name, record)
    return DistilledDataset(folder, config_name)


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
