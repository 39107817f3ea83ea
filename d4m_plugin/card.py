"""The dataset card: what a reader of the Hub wants to know of a distilled set.

What is written here stands between comments, `<!-- d4m:NAME -->` and `<!-- /d4m:NAME -->`: one part about all sets of
a repository, one for each set. Writing a card again replaces these parts and leaves all other text alone.
"""

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any, TypedDict
from urllib.parse import quote

from d4m_plugin.cache import written_whole
from d4m_plugin.checking import content_of, fault_of
from d4m_plugin.diffusion import EMBEDDED
from d4m_plugin.distilled import PARQUET, columns_of
from d4m_plugin.errors import InputError
from d4m_plugin.hub import card_of
from d4m_plugin.recipe import Recipe
from d4m_plugin.record import Record, ResultsRecord

BESIDE_DATA = ("license", "licence", "notice", "requirements")  # files of text, whatever their suffix
UNKNOWN = re.compile(r"^\| (?:real images|diffusion model) \|.*\| unknown \| [^|]*\|$", re.MULTILINE)  # of `SET`
MARK = "<!-- d4m:"  # before the name of a part of ours
MARKUP = re.compile(r"[`<>&|\[\]*\\]")

NOT_GIVEN = {"max_images_per_class": "all", "diffusion_revision": "the newest", "teacher": "none", "lora": "none"}
ABOUT = """
![The images of {config}, one row a class]({config}/preview.png)

A small set of synthetic images in place of the training split of {source}, made by D4M
([CVPR 2024](https://arxiv.org/abs/2407.15138)) with [d4m-plugin](https://pypi.org/project/d4m-plugin/): the real images
of a class are clustered in the latent space of a diffusion model, which makes an image of each cluster's centre. Image
classifiers are trained on it in a fraction of the time.

## Use

```python
from datasets import load_dataset

load_dataset("{where}", "{config}", split="train")
```

```bash
lightning fit --data D4MDataModule {options}
```

```python
from d4m_plugin import DistilledDataset

DistilledDataset("{where}", config_name="{config}", transform=transform)  # for plain PyTorch
```

Columns: `image`; `label`; the `prototype` (cluster) that an image was made from; its `weight`, the share of the class's
real images in that cluster; the `seed` of its noise.

## Limits and bias

The images are synthetic: they may show what no real image does, and not every image shows its class. What the real
images leave out or show too often, and what the diffusion model has learnt elsewhere, is in them too. The set is for
training image classifiers on these classes; measure a classifier on real images.

## Citation

```bibtex
@inproceedings{{su2024d4m,
  title = {{D$^4$M: Dataset Distillation via Disentangled Diffusion Model}},
  author = {{Su, Duo and Hou, Junjie and Gao, Weizhi and Tian, Yingjie and Tang, Bowen}},
  booktitle = {{CVPR}},
  year = {{2024}}
}}
```
"""

SET = """
## {config}: {counted} a class

{total} images of {size} by {size} pixels, {classes} classes: [a picture]({config}/preview.png).

| option | value |
|---|---|
{recipe}

Made again by

```bash
{command}
```

| | | licence | by |
|---|---|---|---|
| real images | {source} | {source_license} | {source_citation} |
| diffusion model | {model} | {model_license} | {model_citation} |

Names of the classes, versions and checksums: `{config}/d4m.json`; the prototypes' latents:
`{config}/prototypes.safetensors`.{labels}
{results}"""

LABELS = " A further column, `logits`, is what the teacher {teacher} says of each image."

RESULTS = """
### Results of {config}

{verdicts}

| student | labels | trained on | images | accuracy on the real test images, % |
|---|---|---|---|---|
{rows}

{seeds} seeds, mean ± standard deviation; {steps} steps of {batch_size} images; learning rate: {rates}; teacher:
{teacher}. Measured by `d4m evaluate`.
"""


class CardConfig(TypedDict):
    """A config of a card's YAML."""

    config_name: str


class CardInfo(TypedDict, total=False):
    """What a card's YAML says of the only config."""

    config_name: str


class CardFields(TypedDict, total=False):
    """What we read of a card's YAML."""

    configs: list[CardConfig]
    dataset_info: CardInfo | list[CardConfig]
    license: str | list[str]
    size_categories: str | list[str]
    source_datasets: str | list[str]
    tags: str | list[str]
    task_categories: str | list[str]


def write_card(folder: Path, config: str, metadata: Record) -> None:
    """Write the README.md of a set's folder, or its parts about this set where one with such parts is there."""
    file = folder / "README.md"
    card = content_of(file) if file.exists() else None
    if card and MARK.encode() not in card:  # of whatever holds the set's folder
        return
    size = sum(path.stat().st_size for path in (folder / config).glob(PARQUET))
    with written_whole(file) as path:
        path.write_text(merged_card(card, config, metadata, size), encoding="utf-8")


def merged_card(
    card: bytes | None,
    config: str,
    metadata: Record,
    size: int,
    hub_id: str | None = None,
    others: Iterable[str] = (),
) -> str:
    """Return a repository's card with a set in it: YAML that tells `datasets` and the Hub what is where, and text.

    Args:
        card: the card that is there.
        config: the set's name.
        metadata: its d4m.json.
        size: bytes of its parquet files.
        hub_id: the repository; none of a folder.
        others: the files in the repository.

    Raises:
        InputError: where the card's YAML is damaged, or the repository holds data that would be hidden.
    """
    source, place = metadata["source"], f"the README.md of {hub_id or 'the folder'}"
    merged = card_of(card or b"---\n{}\n---\n", place)
    if not card:
        merged.data["pretty_name"] = f"{source['name']}, distilled"
    if fault := fault_of({key: value for key, value in vars(merged.data).items() if value is not None}, CardFields, ""):
        raise InputError(f"{place} is no card of a dataset ({fault}); mend it first.")
    hidden = [name for name in others if _is_data(name)]
    if hidden and not merged.data.get("configs"):  # `datasets` finds data that no config names only where none are
        raise InputError(f"`hub_id` is {hub_id!r}, whose data ({hidden[0]}) has no config that names it; name another.")
    text = merged.text.strip() or f"# {_plain(source['name'])}, distilled"
    text = _with_part(text, "about", _about(config, metadata, hub_id))
    text = _with_part(text, config, _set(config, metadata))
    _add_metadata(merged.data, config, metadata, size, text)
    return f"---\n{merged.data.to_yaml()}\n---\n\n{text}\n"


def _is_data(name: str) -> bool:
    """Whether `datasets` would load a file of a repository where no config names others, as rows of its own."""
    from datasets.data_files import FILES_TO_IGNORE
    from datasets.packaged_modules import _EXTENSION_TO_MODULE

    path = PurePath(name)
    passed_over = any(part.startswith((".", "__")) for part in path.parts)
    if passed_over or path.name in FILES_TO_IGNORE or path.stem.lower() in BESIDE_DATA:
        return False
    return path.suffix.lower() in (_EXTENSION_TO_MODULE.keys() | {".zip", ".gz"}) - {".md", ".toml"}  # what tells of it


def _add_metadata(data: Any, config: str, metadata: Record, size: int, text: str) -> None:
    from datasets import DatasetInfo
    from datasets.info import DatasetInfosDict
    from datasets.splits import SplitDict, SplitInfo

    source, total = metadata["source"], metadata["recipe"]["ipc"] * len(metadata["source"]["classes"])
    configs = list(data.get("configs") or [])
    ours = {"config_name": config, "data_files": [{"split": "train", "path": f"{config}/{PARQUET}"}]}
    places = [place for place, each in enumerate(configs) if each["config_name"] == config]
    if places:
        configs[places[0]] |= ours
    else:
        configs.append(ours)
    if not any(each.get("default") or each["config_name"] == "default" for each in configs):
        configs[0]["default"] = True
    data.configs = configs

    licenses = sorted({each for part in (source, metadata["model"]) for each in part["license"].split(", ")})
    _add(data, "license", licenses)
    all_ours = all(_mark(each["config_name"]) in text for each in configs)
    if all_ours and not UNKNOWN.search(text):  # as it was before somebody told
        data.license = [each for each in data.license if each != "unknown"]
    if len(data.license) == 1:
        data.license = data.license[0]
    _add(data, "task_categories", ["image-classification"])
    _add(data, "size_categories", [_size_category(total)])
    _add(data, "source_datasets", [f"extended|{source['hub_id'] or 'other-' + source['name']}"])
    _add(data, "tags", ["d4m", "dataset-distillation", "synthetic"])
    splits = SplitDict({"train": SplitInfo("train", num_bytes=size, num_examples=total)})
    info = DatasetInfo(features=columns_of(source["classes"], "labels" in metadata), splits=splits, dataset_size=size)
    DatasetInfosDict({config: info}).to_dataset_card_data(data)


def _add(data: Any, key: str, values: list[str]) -> None:
    """Add to a list of the YAML what it lacks."""
    there = data.get(key) or []
    data[key] = list(dict.fromkeys(([there] if isinstance(there, str) else list(there)) + values))


def _mark(name: str) -> str:
    """Return what begins a part of ours."""
    return f"{MARK}{name} -->"


def _with_part(text: str, name: str, part: str) -> str:
    """Return text with a part of ours in its place, or at the end."""
    start, end = _mark(name), f"<!-- /d4m:{name} -->"
    part = f"{start}\n{part.strip().replace('<!--', '&lt;!--')}\n{end}"  # of what others wrote, none is a mark
    there = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    return there.sub(lambda _: part, text) if there.search(text) else f"{text.rstrip()}\n\n{part}"


def _about(config: str, metadata: Record, hub_id: str | None) -> str:
    here = "path/to/this/folder"
    options = [
        *_source_options(metadata, "data."),
        f"--data.hub_id {hub_id}" if hub_id else f"--data.set_folder {here}",
        f"--data.config_name {config}",
    ]
    return ABOUT.format(
        source=_code(metadata["source"]["name"]), where=hub_id or here, config=config, options=" ".join(options)
    )


def _set(config: str, metadata: Record) -> str:
    recipe, source, model = metadata["recipe"], metadata["source"], metadata["model"]
    return SET.format(
        config=config,
        counted=counted(recipe["ipc"]),
        total=f"{recipe['ipc'] * len(source['classes']):,}",
        size=recipe["image_size"],
        classes=len(source["classes"]),
        recipe="\n".join(
            f"| {name} | {_cell(name, value)} |"
            for name, value in recipe.items()
            if name != "diffusion_revision" or model["hub_id"]  # else there is none
        ),
        command=_command(metadata),
        source=_linked(source["hub_id"], source["name"], "datasets/"),
        source_license=_plain(source["license"]),
        source_citation=_plain(source["citation"]) or _page(source["hub_id"]),
        model=_linked(model["hub_id"], recipe["diffusion"], ""),
        model_license=_plain(model["license"]),
        model_citation="d4m-plugin" if recipe["diffusion"] in EMBEDDED else _page(model["hub_id"]),
        labels=LABELS.format(teacher=_code(metadata["labels"]["teacher"])) if "labels" in metadata else "",
        results=_results(config, metadata["results"]) if "results" in metadata else "",
    )


def _results(config: str, results: ResultsRecord) -> str:
    rows = [
        f"| {' | '.join([*(_plain(row[part]) for part in ('student', 'labels', 'arm')), amount(row), accuracy(row)])} |"
        for row in results["table"]
    ]
    verdicts = "\n".join(f"- {_plain(sentence)}" for sentence in with_caution(results))
    protocol = results["protocol"]
    return RESULTS.format(
        config=config,
        verdicts=verdicts,
        rows="\n".join(rows),
        seeds=protocol["seeds"],
        steps=protocol["steps"],
        batch_size=protocol["batch_size"],
        rates=rates_of(protocol),
        teacher=_plain(protocol["teacher"]),
    )


def rates_of(protocol: Mapping[str, Any]) -> str:
    """Return the learning rate of all trainings of an evaluation, or how each arm got its own, in words."""
    rates = ", ".join(f"{rate:g}" for rate in protocol["learning_rates"])
    if len(protocol["learning_rates"]) > 1:
        rates += ": each arm has the best on a slice of real training images, by the first seed"
    if protocol["lr_smoothing"] != 1:
        rates += f"; the cosine schedule is stretched {protocol['lr_smoothing']:g} times"
    return rates


def with_caution(results: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the sentences of an evaluation and their verdicts, after what to know before them."""
    caution = {f"Caution: {results['caution']}": None} if results["caution"] else {}
    return {**caution, **results["verdicts"]}


def counted(images: int) -> str:
    """Return a number of images with its noun."""
    return f"{images:,} image" + ("" if images == 1 else "s")


def amount(row: Mapping[str, Any]) -> str:
    """Return how many images an arm has and, where it is counted, in how many bytes: 100 in 61,234 bytes."""
    return f"{row['images']:,}" + ("" if row["bytes"] is None else f" in {row['bytes']:,} bytes")


def accuracy(row: Mapping[str, Any]) -> str:
    """Return an accuracy in percent and, where there is one, its standard deviation: 54.9 ± 0.9; what diverged, too."""
    parts = []
    if row["mean"] is not None:
        parts.append(f"{100 * row['mean']:.1f}" + ("" if row["std"] is None else f" ± {100 * row['std']:.1f}"))
    if row["diverged"]:
        parts.append(f"diverged: seed {', '.join(map(str, row['diverged']))}")
    return "; ".join(parts)


def _command(metadata: Record) -> str:
    """Return the command that makes a set again; of folders, it knows the names alone."""
    options = _source_options(metadata)
    for name, value in metadata["recipe"].items():
        if value not in (getattr(Recipe, name), {}):
            options.append(f"--{name} {_quoted(value)}")
    return " \\\n    ".join(["d4m distill", *options])


def _source_options(metadata: Record, prefix: str = "") -> list[str]:
    source = metadata["source"]
    told = [f"{_quoted(f'--{prefix}source.{name}')} {_quoted(value)}" for name, value in source["arguments"].items()]
    skipped = [f"--{prefix}skip_bad_images true"] if source["skipped"] else []
    return [f"--{prefix}source {_quoted(source['class'])}", *told, *skipped]


def _quoted(value: object) -> str:
    """Return a word of a shell's, in one line."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text.splitlines()) > 1:
        escaped = json.dumps(text, ensure_ascii=False)[1:-1].replace("'", "\\'")
        return f"$'{escaped}'"
    return shlex.quote(text)


def _linked(hub_id: str | None, name: str, kind: str) -> str:
    return f"[{_plain(hub_id)}](https://huggingface.co/{kind}{quote(hub_id)})" if hub_id else _code(name)


def _page(hub_id: str | None) -> str:
    return "see its page" if hub_id else "not stated"


def _size_category(images: int) -> str:
    """Return the Hub's name for a number of rows."""
    names = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M"]
    return names[min(max(len(str(images)) - 3, 0), 4)]


def _cell(name: str, value: object) -> str:
    if value is None:
        return NOT_GIVEN.get(name, "the model's own")
    if value == "":
        return "none"
    if isinstance(value, dict):
        return f"{len(value)}, in d4m.json" if value else "the source's"
    return _code(str(value))


def _code(text: str) -> str:
    """Return text as code of one line; as HTML, where Markdown would see more in it."""
    line = " ".join(text.split())
    return f"<code>{_plain(line)}</code>" if MARKUP.search(line) else f"`{line}`"


def _plain(text: str) -> str:
    """Return what others wrote as one line in which neither Markdown nor HTML sees markup."""
    return MARKUP.sub(lambda found: f"&#{ord(found[0])};", " ".join(text.split()))
