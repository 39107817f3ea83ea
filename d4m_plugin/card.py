"""The dataset card: what a reader of the Hub wants to know of a distilled set."""

from pathlib import Path
from typing import Any

from d4m_plugin.distilled import PARQUET

TEXT = """
# {source}, distilled to {ipc} images a class

![The images, one row a class]({config}/preview.png)

{total} synthetic images that stand for the training split of `{source}`, made by D4M
([CVPR 2024](https://arxiv.org/abs/2407.15138)) with [d4m-plugin](https://pypi.org/project/d4m-plugin/).

```python
from datasets import load_dataset

load_dataset("{folder}", "{config}", split="train")
```

## Recipe

| option | value |
|---|---|
{recipe}

The class names, versions and checksums are in `{config}/d4m.json`, the prototypes' latents in
`{config}/prototypes.safetensors`.
"""


def write_card(folder: Path, metadata: dict[str, Any]) -> None:
    """Write the README.md of a set's folder: YAML that tells `datasets` where the files are, and text."""
    from huggingface_hub import DatasetCardData

    recipe = metadata["recipe"]
    config, total = f"ipc-{recipe['ipc']}", recipe["ipc"] * len(metadata["source"]["classes"])
    source = metadata["source"]["name"]
    data = DatasetCardData(
        pretty_name=f"{source}, distilled ({config})",
        task_categories=["image-classification"],
        tags=["d4m", "dataset-distillation", "synthetic"],
        configs=[{"config_name": config, "data_files": [{"split": "train", "path": f"{config}/{PARQUET}"}]}],
    )
    text = TEXT.format(
        source=source,
        ipc=recipe["ipc"],
        total=f"{total:,}",
        config=config,
        folder=folder.name,
        recipe="\n".join(f"| {name} | {_cell(value)} |" for name, value in recipe.items()),
    )
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n{text}", encoding="utf-8")


def _cell(value: object) -> str:
    return "the model's own" if value is None else f"`{value!s}`".replace("|", "\\|").replace("\n", " ")
