"""Whatever `datasets.load_dataset` opens: the Hugging Face Hub, folders and files."""

import hashlib
import io
import warnings
from collections.abc import Iterator, Sequence
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from d4m_plugin.checking import check_least
from d4m_plugin.errors import InputError, first_line
from d4m_plugin.hub import license_of
from d4m_plugin.sources.base import IndexedSource
from d4m_plugin.sources.images import natural_size, read_image, size_of
from d4m_plugin.sources.names import Synonyms, readable

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

TEST_SPLITS = ("test", "validation", "val", "valid", "dev")
IN_AN_ARCHIVE = "::"  # between a file's name there and the archive's, as `datasets` writes them
TAIL = 32  # bytes of an image file that the fingerprint reads
FILE_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}


class HuggingFace(IndexedSource):
    """A labelled image dataset of the Hugging Face Hub, or a folder or file that `datasets.load_dataset` opens.

    Rows with no label (null, not a number, below 0 as in many Hub datasets' test splits, or empty) are left out. The
    classes are those that the training split has images of.

    Args:
        path: a Hub id such as `ylecun/mnist`, a folder, or a .parquet, .arrow or .tar file.
        config: which of several configurations, as `load_dataset` calls `name`.
        revision: branch, tag or commit of a Hub id.
        image_column: the column of the images; by default the one of type `Image`.
        label_column: the column of the labels; by default the one of type `ClassLabel`, else `label` or `labels`.
        train_split: the split to distil.
        test_split: the split that accuracies are measured on; by default test, else validation; where there is
            neither, `test_share` of the training images are set apart.
        test_share: share of each class that is set apart where there is no test split, in (0, 1).
        split_seed: decides which images are set apart.
        image_size: edge in pixels of the images that students see; by default their own, at most 224.
        synonyms: of WordNet's names, the `first` or `all`.

    Raises:
        InputError: where it cannot be opened, or a column or split is not there or not to be told.
    """

    _tests_apart = True  # from the training images

    def __init__(
        self,
        path: str | Path,
        config: str | None = None,
        revision: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        train_split: str = "train",
        test_split: str | None = None,
        test_share: float = 0.2,
        split_seed: int = 0,
        image_size: int | None = None,
        synonyms: Synonyms = "first",
    ) -> None:
        check_least(1, image_size=image_size)
        self.path, self.config, self.revision = str(path), config, revision
        self.hub_id = None if Path(path).expanduser().exists() else self.path
        splits = _load(self.path, config, revision)
        train = _split(splits, train_split, "train_split")
        tests = [name for name in TEST_SPLITS if name in splits and name != train_split]
        if test_split is not None:
            _split(splits, test_split, "test_split")
            if test_split == train_split and self._tests_apart:
                raise InputError(f"`test_split` is {test_split!r}, the training split: its images would be both.")
            tests = [test_split]

        image_column = image_column or _image_column(train)
        label_column = label_column or _label_column(train)
        for option, column in (("image_column", image_column), ("label_column", label_column)):
            if column not in train.column_names:
                raise InputError(f"`{option}` is {column!r}, but the columns are {', '.join(train.column_names)}.")
        values = _label_values(train, label_column)
        known = sorted({value for value in values if value is not None})
        if not known:
            raise InputError(f"`label_column` is {label_column!r}, in which no row of {train_split} has a label.")
        self.classes = _names(train, label_column, known, synonyms)
        self._train = _Rows.of(train, image_column, values, known)
        for name in tests:
            self._test = _Rows.of(splits[name], image_column, _label_values(splits[name], label_column), known)
            if len(self._test):
                break
        else:
            if test_split is not None:
                raise InputError(f"`test_split` is {test_split!r}, of which no row has a label.")
            self._set_apart(test_share, split_seed)
        self.image_size = image_size or natural_size(self._train)

    @property
    def name(self) -> str:
        """The last part of the path, of a file without its suffix, in lower case."""
        here = Path(self.path).expanduser()
        if here.is_file():
            return here.stem.lower()
        return (here.resolve() if here.exists() else here).name.lower()  # such as `.`; a Hub id's dots stay

    @cached_property
    def license(self) -> str:  # type: ignore[override]  # read when asked for
        """The licence that the dataset's card states."""
        return license_of(self.path, "dataset", self.revision)


class _Rows:
    """Rows of a dataset as labelled images."""

    def __init__(self, rows: "Dataset", column: str, indices: np.ndarray, labels: np.ndarray) -> None:
        self.rows, self.column, self.indices, self.targets = rows, column, indices, labels.tolist()

    @classmethod
    def of(cls, rows: "Dataset", column: str, values: list[Any], known: list[Any]) -> "_Rows":
        """Return the rows whose label is known."""
        unknown = sorted({value for value in values if value is not None} - set(known))
        if unknown:
            raise InputError(f"the test split has the label {unknown[0]!r}, of which the training split has no image.")
        label_of = {value: label for label, value in enumerate(known)}
        labels = np.array([label_of.get(value, -1) for value in values])
        indices = np.flatnonzero(labels >= 0)
        import datasets

        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Downcasting array dtype")  # of pixels, which are small
                rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        except Exception as error:  # pyarrow's of many kinds
            kind = type(rows.features[column]).__name__
            raise InputError(f"`image_column` is {column!r}, of type {kind}, which holds no images: {error}") from error
        return cls(rows, column, indices, labels[indices])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        row = int(self.indices[index])
        image: dict[str, Any] | None = self.rows[row][self.column]
        if image is None:
            raise InputError(f"row {row} has no image.")
        name: str = image["path"] or f"row {row}"
        if image["bytes"] is not None:
            return read_image(io.BytesIO(image["bytes"]), name), self.targets[index]
        if IN_AN_ARCHIVE not in name:
            return read_image(name, name), self.targets[index]
        from datasets.utils.file_utils import xopen

        with xopen(name, "rb") as file:
            return read_image(io.BytesIO(file.read()), name), self.targets[index]

    def only(self, chosen: Sequence[int]) -> "_Rows":
        """Return some of them."""
        return _Rows(self.rows, self.column, self.indices[chosen], np.asarray(self.targets)[chosen])

    @property
    def keys(self) -> list[bytes]:
        """Their numbers in the dataset."""
        return [b"%d" % index for index in self.indices.tolist()]

    @property
    def fingerprint(self) -> str:
        """A hash of labels, sizes, last bytes (which hold a PNG's checksum) and names."""
        digest = hashlib.sha256(np.asarray(self.targets, np.int64).tobytes())
        for size, tail, name in self._encoded():
            inner = (name or "").partition(IN_AN_ARCHIVE)[0]
            digest.update(f"{size} {tail!r} {Path(inner).name}\0".encode())
        return digest.hexdigest()

    def stored_bytes(self) -> list[int]:
        """Return the size of each encoded image."""
        return [size or 0 for size, *_ in self._encoded()]

    def _encoded(self) -> Iterator[tuple[int | None, bytes | None, str | None]]:
        """Yield the size, the last bytes, and the name of each image's encoded bytes; of a file of its own, no bytes.

        `indices` ascends, as the rows are taken chunk by chunk.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        start = 0
        for chunk in self.rows.with_format("arrow")[:][self.column].chunks:
            first, last = np.searchsorted(self.indices, (start, start + len(chunk)))
            own = self.indices[first:last] - start
            content = chunk.field("bytes")
            parts = (pc.binary_length(content), pc.binary_slice(content, -TAIL), chunk.field("path"))
            for size, tail, name in zip(*(part.take(pa.array(own)).to_pylist() for part in parts), strict=True):
                yield _size_of(name) if size is None and name else size, tail, name
            start += len(chunk)


def _size_of(name: str) -> int:
    """Return the size of an image's file, on its own or in an archive, -1 where it cannot be told."""
    if IN_AN_ARCHIVE not in name:
        return size_of(name)
    from datasets.utils.file_utils import xgetsize

    try:
        return int(xgetsize(name))
    except OSError:
        return -1


def _load(path: str, config: str | None, revision: str | None) -> "DatasetDict":
    import datasets

    file = Path(path).expanduser()
    if file.is_file() and file.suffix not in FILE_BUILDERS:
        raise InputError(f"`path` is the file {path!r}; it must end in one of {', '.join(FILE_BUILDERS)}.")
    if file.exists() and revision is not None:
        raise InputError(f"`revision` is {revision!r}, but `path` is {path!r}, which lies here; only the Hub has some.")
    if file.is_file() and config is not None:
        raise InputError(f"`config` is {config!r}, but `path` is the file {path!r}, which has none.")
    try:
        if file.is_file():
            return datasets.load_dataset(FILE_BUILDERS[file.suffix], data_files=str(file))
        if file.is_dir():  # resolved, as `datasets` wants a name in it, which `.` is not
            return datasets.load_dataset(str(file.resolve()), config)
        return _load_from_the_hub(path, config, revision)
    except InputError:
        raise
    except Exception as error:  # of all kinds, for files and cards that are something else
        reason = " ".join(str(error).partition("\nExample")[0].split()).rstrip(".")
        if isinstance(error, datasets.exceptions.DatasetGenerationError):  # which says nothing
            reason = first_line(error.__cause__ or error)
        told = "; name one as `config`" if "available configs" in reason else ""
        raise InputError(f"`path` is {path!r}, which `datasets` cannot open: {reason}{told}.") from error


def _load_from_the_hub(path: str, config: str | None, revision: str | None) -> "DatasetDict":
    """Return a dataset of the Hub, or the copy that `datasets` has kept of it, if that is of the revision."""
    import datasets
    from datasets.packaged_modules.cache.cache import Cache
    from huggingface_hub import try_to_load_from_cache

    builder = datasets.load_dataset_builder(path, config, revision=revision)
    if revision is not None and isinstance(builder, Cache):  # the latest copy, whatever was asked for
        card = try_to_load_from_cache(path, "README.md", repo_type="dataset", revision=revision)
        commit = Path(card).parent.name if isinstance(card, str) else revision
        if builder.hash != commit:
            raise InputError(
                f"`revision` is {revision!r}, but the Hub does not give it, and the newest copy of {path} here is of "
                f"commit {builder.hash}; name that, or fetch yours anew."
            )
    builder.download_and_prepare()
    return builder.as_dataset()


def _split(splits: "DatasetDict", name: str, option: str) -> "Dataset":
    if name not in splits:
        raise InputError(f"`{option}` is {name!r}, but the splits are {', '.join(splits)}.")
    return splits[name]


def _image_column(rows: "Dataset") -> str:
    import datasets

    found = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    return _the_only(found, rows, "images", "image_column")


def _label_column(rows: "Dataset") -> str:
    import datasets

    found = [name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    found = found or [name for name in ("label", "labels") if name in rows.column_names]
    return _the_only(found, rows, "labels", "label_column")


def _the_only(found: list[str], rows: "Dataset", what: str, option: str) -> str:
    if len(found) != 1:
        columns = ", ".join(found or rows.column_names)
        raise InputError(f"{len(found)} columns hold {what} ({columns}); name one as `{option}`.")
    return found[0]


def _label_values(rows: "Dataset", column: str) -> list[Any]:
    """Return each row's label as it stands there, but whole numbers as such; None where there is none."""
    import datasets

    feature = rows.features[column]
    if not isinstance(feature, datasets.Value | datasets.ClassLabel):
        kind = type(feature).__name__
        raise InputError(f"`label_column` is {column!r}, of type {kind}, where one label a row is needed.")
    return [_label(value) for value in rows[column][:]]


def _label(value: Any) -> Any:
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, Decimal):  # as databases have them
        value = float(value)
    if isinstance(value, float) and value.is_integer():  # as pandas makes them of whole numbers with gaps
        value = int(value)
    missing = not value >= 0 if isinstance(value, int | float) else not value  # not a number is not below 0
    return None if missing else value


def _names(rows: "Dataset", column: str, values: list[Any], synonyms: Synonyms) -> list[str]:
    import datasets

    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel) and values[-1] >= feature.num_classes:
        raise InputError(f"`label_column` is {column!r}, which holds {values[-1]}, but names {feature.num_classes}.")
    names = [feature.int2str(value) if isinstance(feature, datasets.ClassLabel) else str(value) for value in values]
    return [readable(name, synonyms) for name in names]
