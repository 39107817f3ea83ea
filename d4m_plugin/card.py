"""The dataset card: what a reader of the Hub wants to know of a distilled set."""

from pathlib import Path
from typing import Any

from d4m_plugin.distilled import PARQUET, features_of

TEXT = """
# {source}, distilled to {ipc} images a class

![The images, one row a class]({config}/preview.png)

{total} synthetic images that stand for the training split of `{source}`, made by D4M
([CVPR 2024](https://arxiv.org/abs/2407.15138)) with [d4m-plugin](https://pypi.org/project/d4m-plugin/).

```python
from datasets import load_dataset

load_dataset("path/to/this/folder", "{config}", split="train")
```

## Recipe

| option | value |
|---|---|
{recipe}

The class names, versions and checksums are in `{config}/d4m.json`, the prototypes' latents in
`{config}/prototypes.safetensors`.
"""


def write_card(folder: Path, config: str, metadata: dict[str, Any]) -> None:
    """Write the README.md of a set's folder: YAML that tells `datasets` and the Hub what is where, and text."""
    from datasets import DatasetInfo
    from datasets.info import DatasetInfosDict
    from datasets.splits import SplitDict, SplitInfo
    from huggingface_hub import DatasetCardData

    recipe, source = metadata["recipe"], metadata["source"]
    total, size = recipe["ipc"] * len(source["classes"]), (folder / config / PARQUET).stat().st_size
    data = DatasetCardData(
        pretty_name=f"{source['name']}, distilled ({config})",
        license=source["license"],
        task_categories=["image-classification"],
        size_categories=[_size_category(total)],
        source_datasets=[f"extended|other-{source['name']}"],
        tags=["d4m", "dataset-distillation", "synthetic"],
        configs=[{"config_name": config, "data_files": [{"split": "train", "path": f"{config}/{PARQUET}"}]}],
    )
    splits = SplitDict({"train": SplitInfo("train", num_bytes=size, num_examples=total)})
    info = DatasetInfo(features=features_of(source["classes"], "labels" in metadata), splits=splits, dataset_size=size)
    DatasetInfosDict({config: info}).to_dataset_card_data(data)
    text = TEXT.format(
        source=source["name"],
        ipc=recipe["ipc"],
        total=f"{total:,}",
        config=config,
        recipe="\n".join(f"| {name} | {_cell(name, value)} |" for name, value in recipe.items()),
    )
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n{text}", encoding="utf-8")


def _size_category(images: int) -> str:
    """Return the Hub's name for a number of rows."""
    names = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M"]
    return names[min(max(len(str(images)) - 3, 0), 4)]


def _cell(name: str, value: object) -> str:
    if value is None:
        return "all" if name == "max_images_per_class" else "the model's own"
    if isinstance(value, dict):
        return f"{len(value)}, in d4m.json" if value else "the source's"
    return f"`{value!s}`".replace("|", "\\|").replace("\n", " ")
