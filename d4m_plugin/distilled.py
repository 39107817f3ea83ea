"""The distilled set on disk: a folder that is a Hugging Face dataset repository, and a torchvision dataset.

README.md                               card
ipc-10/train-00000-of-00001.parquet     image (PNG), label, prototype, weight, seed, and perhaps logits
ipc-10/d4m.json                         recipe, source, versions, checksums, timings
ipc-10/prototypes.safetensors           for each label: LABEL.latents [K, C, h, w], LABEL.weights [K]
ipc-10/preview.png, prototypes.png      a grid each, one row a class
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import VisionDataset
from torchvision.transforms.v2.functional import pil_to_tensor

from d4m_plugin.errors import InputError
from d4m_plugin.preview import to_pil

FORMAT = 2
PARQUET = "train-00000-of-00001.parquet"


class DistilledDataset(VisionDataset):
    """A distilled set as a torchvision dataset of (PIL image, label), held in memory.

    Attributes:
        images: uint8, shape (N, 3, H, W), class by class.
        targets: the label of each image, in [0, len(classes)).
        classes: the class names in the order of the labels.
        weights: the share of its class that each image's prototype stands for, float32, shape (N,).
        logits: a teacher's, where `relabel` has stored them, float32, shape (N, classes).
        recipe: what the set was made by, as in its d4m.json.
        folder: where its files lie.

    Args:
        root: the set's folder.
        config: which of several sets in the folder, such as `ipc-10`; the only one by default.
        transform: of the image.
        target_transform: of the label.

    Raises:
        InputError: where the folder is not a distilled set, or holds several and none is named.
    """

    def __init__(
        self,
        root: str | Path,
        config: str | None = None,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(root, transform=transform, target_transform=target_transform)
        self.folder = _find_config(Path(root), config)
        self.metadata = _read_metadata(self.folder)
        self.recipe: dict[str, Any] = self.metadata["recipe"]
        self.classes: list[str] = self.metadata["source"]["classes"]
        try:
            table = pq.read_table(self.folder / PARQUET)
        except (OSError, ValueError) as error:
            raise InputError(f"{str(self.folder / PARQUET)!r} is missing or damaged ({error}).") from error
        self.targets: list[int] = table["label"].to_pylist()
        self.weights = torch.tensor(table["weight"].to_pylist(), dtype=torch.float32)
        self.logits: Tensor | None = None
        if "logits" in table.column_names:
            flat = table["logits"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            self.logits = torch.from_numpy(flat.astype("float32")).view(-1, len(self.classes))
        encoded = table["image"].to_pylist()
        self.images = torch.stack([pil_to_tensor(Image.open(io.BytesIO(image["bytes"]))) for image in encoded])

    @property
    def preview(self) -> Path:
        """The picture of the set."""
        return self.folder / "preview.png"

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image: Any = to_pil(self.images[index])
        target: Any = self.targets[index]
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target


def _find_config(root: Path, config: str | None) -> Path:
    found = sorted(path.parent.name for path in root.glob("*/d4m.json"))
    if not found:
        raise InputError(f"{str(root)!r} is not a distilled set: no d4m.json lies in a folder of it.")
    if config is None and len(found) > 1:
        raise InputError(f"{str(root)!r} holds several sets; name one as `config`: {', '.join(found)}.")
    config = config or found[0]
    if config not in found:
        raise InputError(f"`config` is {config!r}, but {str(root)!r} holds {', '.join(found)}.")
    return root / config


def _read_metadata(folder: Path) -> dict[str, Any]:
    try:
        metadata: dict[str, Any] = json.loads((folder / "d4m.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{str(folder / 'd4m.json')!r} is damaged ({error}); distil or fetch the set anew.") from error
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"{str(folder)!r} is of format {metadata.get('format')!r}, not {FORMAT}; use the d4m-plugin that wrote it."
        )
    return metadata


def features_of(classes: list[str], with_logits: bool = False) -> Any:
    """Return the columns of a set as `datasets.Features`, which number the second class of a name: "crane (2)"."""
    from datasets import ClassLabel, Features, Image, List, Value

    names: dict[str, None] = {}  # in order
    for name in classes:
        number, unique = 1, name
        while unique in names:
            number += 1
            unique = f"{name} ({number})"
        names[unique] = None
    columns = {
        "image": Image(),
        "label": ClassLabel(names=list(names)),
        "prototype": Value("int32"),
        "weight": Value("float32"),
        "seed": Value("int64"),
    }
    if with_logits:
        columns["logits"] = List(Value("float16"), length=len(classes))
    return Features(columns)


def write_parquet(path: Path, classes: list[str], blocks: Iterable[dict[str, Tensor]]) -> None:
    """Write a set's images as parquet that `datasets.load_dataset` reads, holding one block in memory at a time.

    Args:
        path: the file to write.
        classes: the class names.
        blocks: columns of a few images each: `image` (uint8, shape (n, 3, H, W)), `label`, `prototype`, `weight` and
            `seed` (shape (n,)).
    """
    import pyarrow as pa

    schema = features_of(classes).arrow_schema
    with pq.ParquetWriter(path, schema) as writer:
        for block in blocks:
            columns: dict[str, list[Any]] = {name: column.tolist() for name, column in block.items() if name != "image"}
            columns["image"] = [{"bytes": _png(image), "path": None} for image in block["image"]]
            writer.write_table(pa.table(columns, schema=schema))


def _png(image: Tensor) -> bytes:
    file = io.BytesIO()
    to_pil(image).save(file, "PNG")
    return file.getvalue()


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
