"""The distilled set on disk: a folder that is a Hugging Face dataset repository, and a torchvision dataset.

README.md                               card
ipc-10/train-00000-of-00001.parquet     image (PNG), label, prototype, weight, seed, and perhaps logits; at most 500 MB
ipc-10/d4m.json                         recipe, source, versions, checksums, timings
ipc-10/prototypes.safetensors           for each label: LABEL.latents [K, C, h, w], float16, LABEL.weights [K]
ipc-10/preview.png, prototypes.png      a grid each, one row a class
"""

import collections
import io
import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torchvision.datasets import VisionDataset
from torchvision.transforms.v2.functional import to_pil_image

from d4m_plugin.cache import checksum
from d4m_plugin.errors import InputError, first_line
from d4m_plugin.hub import fetch_set, find_repository, is_hub_id
from d4m_plugin.prototypes import Prototypes
from d4m_plugin.record import Record, read_record
from d4m_plugin.sources import Source
from d4m_plugin.sources.images import Resize, read_image, to_pixels

CONFIG = re.compile(r"\w[\w.-]*")  # a config's name, which cards, URLs and commands hold as it is
PARQUET = "train-*.parquet"
SHARD = 500_000_000  # bytes, at most
ROWS = 64  # read at once


class DistilledDataset(VisionDataset):
    """A distilled set, of a folder or of the Hub, as a torchvision dataset of (PIL image, label).

    Attributes:
        targets: the label of each image, in [0, len(classes)).
        classes: the class names in the order of the labels.
        weights: the share of its class that each image's prototype stands for, float32, shape (N,).
        logits: a teacher's, where `relabel` has stored them, float32, shape (N, classes).
        metadata: its d4m.json.
        recipe: what the set was made by, as in its d4m.json.
        folder: where its files lie.
        revision: the commit, of a set of the Hub.

    Args:
        root: a folder of sets or that of one of them, or the Hub's dataset repository, as user/name.
        config_name: which of several sets there, such as `ipc-10`; the only one by default.
        revision: branch, tag or commit of a repository.
        transform: of the image.
        target_transform: of the label.

    Raises:
        InputError: where it is no distilled set, or there are several and none is named, or the Hub gives none.
    """

    def __init__(
        self,
        root: str | Path,
        config_name: str | None = None,
        revision: str | None = None,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        root = root.expanduser() if isinstance(root, Path) else os.path.expanduser(root)
        if (Path(root) / "d4m.json").is_file():  # one of several sets is named by its own folder
            own = Path(root).resolve()
            root, config_name = own.parent, config_name or own.name
        super().__init__(root, transform=transform, target_transform=target_transform)
        self.revision: str | None = None
        if _is_repository(root):
            try:
                repository = find_repository(str(root), revision)
            except InputError as error:
                raise type(error)(f"{root!r} is no folder here; {error}") from error
            self.revision = repository.revision
            self.folder = fetch_set(str(root), self.revision, _choose(repository.configs, config_name, str(root)))
        else:
            folders = Path(root).glob("*/d4m.json") if Path(root).is_dir() else ()
            found = sorted(path.parent.name for path in folders)
            self.folder = Path(root) / _choose(found, config_name, str(root))
        self.metadata = read_record(self.folder)
        self.recipe = self.metadata["recipe"]
        self.classes = self.metadata["source"]["classes"]
        columns = _read_columns(self.folder, self.metadata)
        self.weights = columns["weight"]
        self.targets: list[int] = columns["label"].tolist()
        self.logits: Tensor | None = None
        if "logits" in columns:
            self.logits = columns["logits"].float().view(len(self), -1)

    def fetch_whole(self) -> None:
        """Have in `folder` also what training does not need of a set of the Hub, such as its prototypes."""
        if self.revision is not None:
            fetch_set(str(self.root), self.revision, self.folder.name, whole=True)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        tag: str | None = None,
        source_license: str | None = None,
        model_license: str | None = None,
    ) -> str:
        """Upload the set, in one commit, to a dataset repository, and read it back.

        Other sets, and other people's files and text there, stay.

        Args:
            repo_id: the repository, as user/name; made where it is not there.
            private: make it a private one.
            tag: a name for the commit, such as `v1`.
            source_license: of the real images, by the Hub's name for it, where the set does not know it.
            model_license: of the diffusion model, likewise.

        Returns:
            The commit, to be given as `revision`.

        Raises:
            InputError: where the Hub refuses; the set here stays as it is.
        """
        from d4m_plugin.pushing import push  # a later stage, which takes sets

        return push(self, repo_id, private, tag, source_license, model_license)

    @cached_property
    def images(self) -> Tensor:
        """The images, uint8, shape (N, 3, H, W), class by class: decoded when they are first asked for, and held.

        Without them, each image is decoded anew whenever it is asked for alone.
        """
        return self._read(self.recipe["image_size"], "crop")

    def squares(self, size: int, resize: Resize = "crop") -> Tensor:
        """Return the images as squares of another size, uint8, shape (N, 3, size, size), which alone are held.

        Args:
            size: edge in pixels; of the images' own, they are `images`.
            resize: how real images became squares.
        """
        return self.images if size == self.recipe["image_size"] else self._read(size, resize)

    def _read(self, size: int, resize: Resize) -> Tensor:
        """Return the images of a size, each from its file, many at once: decoding leaves Python's lock alone.

        Raises:
            InputError: where they are something else than the record says.
        """
        # Warnings' filters, which reading sets for a while, are all threads'.
        with _told_of(self.folder), warnings.catch_warnings(), ThreadPoolExecutor() as pool:
            try:
                images = torch.empty(len(self), 3, size, size, dtype=torch.uint8)
            except RuntimeError as error:
                raise ValueError(f"{len(self):,} images of {size:,} pixels do not fit in memory") from error

            def read(row: int, encoded: pa.BinaryScalar) -> None:
                images[row] = to_pixels(_decoded(encoded, row, self.recipe["image_size"]), size, resize)

            start = 0
            for batch in _batches(map(pq.ParquetFile, shards(self.folder)), "image"):
                if start + len(batch) > len(self):
                    raise ValueError(f"it has more rows than it says, {len(self):,}")
                collections.deque(pool.map(read, itertools.count(start), batch), 0)
                start += len(batch)
        return images

    @cached_property
    def _encoded(self) -> pa.ChunkedArray:
        """The images' files."""
        with _told_of(self.folder):
            return pa.chunked_array(_batches(map(pq.ParquetFile, shards(self.folder)), "image"), pa.binary())

    @property
    def class_to_idx(self) -> dict[str, int]:
        """The label of each class by its name, of two of one name the first's, as torchvision's datasets have it."""
        return {name: self.classes.index(name) for name in self.classes}

    @property
    def preview(self) -> Path:
        """The picture of the set."""
        return self.folder / "preview.png"

    def caution_of(self, source: Source) -> str:
        """Return what to know of accuracies on a source's test images; nothing where that source was distilled."""
        if self.metadata["source"]["fingerprint"] == source.fingerprint:
            return ""
        return (
            f"the set was not distilled from the training images of {source.name} as they are given here (other files, "
            "`skip_bad_images` otherwise, or other test images set apart): some of these test images may be in it."
        )

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if "images" in vars(self):
            image: Any = to_pil_image(self.images[index])
        else:  # one alone, as each process of a loader would decode all of them, in each epoch
            row = range(len(self))[index]
            with _told_of(self.folder):
                image = _decoded(self._encoded[row], row, self.recipe["image_size"])
        target: Any = self.targets[index]
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target


def _choose(found: Sequence[str], config: str | None, root: str) -> str:
    if not found:
        raise InputError(f"{root!r} is not a distilled set: no d4m.json lies in a folder of it.")
    if config is None and len(found) > 1:
        raise InputError(f"{root!r} holds several sets; name one as `config_name`: {', '.join(found)}.")
    config = config or found[0]
    if config not in found:
        raise InputError(f"`config_name` is {config!r}, but {root!r} holds {', '.join(found)}.")
    if not CONFIG.fullmatch(config):
        raise InputError(f"{root!r} holds a set named {config!r}; rename it by letters, digits, `.`, `-` and `_`.")
    return config


def _is_repository(root: str | Path) -> bool:
    """Whether a root is of the form user/name, and no folder here."""
    return isinstance(root, str) and is_hub_id(root) and not Path(root).exists()


def shards(folder: Path) -> list[Path]:
    """Return the parquet files of a set in order."""
    found = sorted(folder.glob(PARQUET))
    if not found:
        raise InputError(f"{str(folder / PARQUET)!r} is missing.")
    return found


def _read_columns(folder: Path, record: Record) -> dict[str, Tensor]:
    """Return the columns of a set that training needs, but for the images, as its record says them to be.

    Returns:
        `label`, int64, and `weight`, float32, shape (N,); where a teacher's are stored, `logits`, float16, shape
        (N, classes).

    Raises:
        InputError: where they, or the type of the images, are something else.
    """
    classes, ipc = len(record["source"]["classes"]), record["recipe"]["ipc"]
    types = {
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "label": pa.int64(),
        "weight": pa.float32(),
    }
    if "labels" in record:
        types["logits"] = pa.list_(pa.float16(), classes)
    with _told_of(folder):
        files = [pq.ParquetFile(path) for path in shards(folder)]
        for file, (name, wanted) in itertools.product(files, types.items()):
            found = [field.type for field in file.schema_arrow if field.name == name]
            if found != [wanted]:
                raise ValueError(f"column {name!r} is {found[0] if found else 'missing'}; it must be {wanted}")
        if (there := sum(file.metadata.num_rows for file in files)) != classes * ipc:
            raise ValueError(f"it has {there:,} rows; it must have {classes * ipc:,}")
        columns = {
            name: torch.cat([torch.tensor(values.to_numpy(zero_copy_only=False)) for values in _batches(files, name)])
            for name in types
            if name != "image"
        }
        if columns["label"].tolist() != [label for label in range(classes) for _ in range(ipc)]:
            raise ValueError(f"column 'label' is not {ipc} images of each of {classes} classes, class by class")
        if not ((columns["weight"] > 0) & (columns["weight"] <= 1)).all():
            raise ValueError("column 'weight' has shares that are not in (0, 1]")
        if not columns.get("logits", columns["weight"]).isfinite().all():
            raise ValueError("column 'logits' has values that are no numbers")
    return columns


def _decoded(encoded: pa.BinaryScalar, row: int, size: int) -> Image.Image:
    image = read_image(io.BytesIO(encoded.as_py()), f"row {row}")
    if image.size != (size, size):
        raise ValueError(f"row {row} has {image.width} by {image.height} pixels; it must have {size} by {size}")
    return image


@contextmanager
def _told_of(folder: Path) -> Iterator[None]:
    """Tell of what is wrong with a set's parquet files in one sentence."""
    try:
        yield
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        reason = first_line(error)
        raise InputError(f"{str(folder / PARQUET)!r} is missing or damaged ({reason}).") from error


def _batches(files: Iterable[pq.ParquetFile], name: str) -> Iterator[pa.Array]:
    """Yield the values of a column, a few rows at a time."""
    for file in files:
        for batch in file.iter_batches(ROWS, columns=["image.bytes" if name == "image" else name]):
            yield _values(batch[name], name)


def _values(column: pa.Array, name: str) -> pa.Array:
    """Return the values of a column: of images their bytes, of lists what is in them, one after another."""
    values = column
    if pa.types.is_struct(column.type):
        values = column.field("bytes")
    elif pa.types.is_fixed_size_list(column.type):
        values = column.flatten()
    if column.null_count or values.null_count:
        raise ValueError(f"column {name!r} has empty cells")
    return values


def read_prototypes(file: Path, recipe: dict[str, Any], classes: int) -> list[Prototypes]:
    """Return the prototypes of each class from a set's prototypes.safetensors.

    Args:
        file: the file.
        recipe: the set's.
        classes: how many.

    Raises:
        InputError: where it is damaged, or holds other tensors.
    """
    try:
        tensors = load_file(file)
        found = [Prototypes(tensors[f"{label}.latents"], tensors[f"{label}.weights"]) for label in range(classes)]
        shape = found[0].latents.shape[1:]  # of each latent
        for each in found:
            count = len(each.weights)
            if not 1 <= count <= recipe["prototypes"] or each.latents.shape != (count, *shape) or len(shape) != 3:
                raise ValueError(f"latents of shape {tuple(each.latents.shape)} for {count} weights")
            if (each.latents.dtype, each.weights.dtype) != (torch.float16, torch.float32):
                raise ValueError("latents that are not of 16 bits, or weights not of 32")
            if not all(part.isfinite().all() for part in (each.latents, each.weights)):
                raise ValueError("values that are no numbers")
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise InputError(f"{str(file)!r} is missing or damaged ({error}).") from error
    return [Prototypes(each.latents.float(), each.weights) for each in found]


def columns_of(classes: list[str], with_logits: bool = False) -> Any:
    """Return the columns of a set as `datasets.Features`, which number the second class of a name: "crane (2)".

    A name's U+0085, a line's end to YAML alone, is a space, as which a card would be read.
    """
    from datasets import ClassLabel, Features, List, Value
    from datasets import Image as ImageFeature

    names: dict[str, None] = {}  # in order
    for name in (each.replace("\x85", " ") for each in classes):
        number, unique = 1, name
        while unique in names:
            number += 1
            unique = f"{name} ({number})"
        names[unique] = None
    columns = {
        "image": ImageFeature(),
        "label": ClassLabel(names=list(names)),
        "prototype": Value("int32"),
        "weight": Value("float32"),
        "seed": Value("int64"),
    }
    if with_logits:
        columns["logits"] = List(Value("float16"), length=len(classes))
    return Features(columns)


def write_parquet(folder: Path, classes: list[str], blocks: Iterable[dict[str, Tensor]]) -> None:
    """Write a set's images as parquet that `datasets.load_dataset` reads, holding one block in memory at a time.

    Args:
        folder: where the files go.
        classes: the class names.
        blocks: columns of a few images each, as `with_png` returns them: of `label`, `prototype`, `weight` and `seed`,
            shape (n,), too.
    """
    schema = columns_of(classes).arrow_schema
    writer, room = None, 0
    written: list[Path] = []
    for block in blocks:
        columns: dict[str, list[Any]] = {
            name: column.tolist() for name, column in block.items() if name in schema.names
        }
        columns["image"] = [{"bytes": file, "path": None} for file in png_of(block)]
        table = pa.table(columns, schema=schema)
        if writer is None or table.nbytes > room:
            if writer:
                writer.close()
            written.append(folder / f"{len(written):05d}.parquet")
            writer, room = pq.ParquetWriter(written[-1], schema), SHARD
        writer.write_table(table)
        room -= table.nbytes  # PNGs do not shrink
    if writer:
        writer.close()
    for number, path in enumerate(written):
        path.replace(folder / f"train-{number:05d}-of-{len(written):05d}.parquet")


def with_png(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return columns of images that have the images as PNG.

    Args:
        columns: `image`, uint8, shape (n, 3, H, W), and others.

    Returns:
        The others; `png`, the files one after another, uint8, shape (bytes,); `png_size`, the bytes of each, int64,
        shape (n,).
    """
    files = [png(image) for image in columns["image"]]
    others = {name: column for name, column in columns.items() if name != "image"}
    joined = torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8)
    return others | {"png": joined, "png_size": torch.tensor(list(map(len, files)))}


def png_of(columns: dict[str, Tensor]) -> list[bytes]:
    """Return the PNG files of columns that `with_png` returned."""
    return [file.numpy().tobytes() for file in columns["png"].split(columns["png_size"].tolist())]


def png(image: Tensor) -> bytes:
    """Return an image, uint8, shape (3, H, W), encoded without loss."""
    file = io.BytesIO()
    to_pil_image(image).save(file, "PNG")
    return file.getvalue()


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in a folder."""
    return {path.name: checksum(path) for path in sorted(folder.iterdir()) if path.is_file()}
