"""What a stranger's set, card, teacher or image can try: one sentence each, nothing run, nothing written elsewhere."""

import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zlib

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Features, load_dataset
from huggingface_hub import DatasetCard
from PIL import Image
from safetensors.torch import load_file, save_file

from d4m_plugin import DistilledDataset, InputError, Recipe, cli, console, distill
from d4m_plugin.card import merged_card, write_card
from d4m_plugin.diffusion import LatentDiffusion
from d4m_plugin.distilled import read_prototypes
from d4m_plugin.evaluation.sets import open_set
from d4m_plugin.hub import license_of
from d4m_plugin.pushing import push
from d4m_plugin.sources import HuggingFace, ImageFolder
from d4m_plugin.sources.images import read_image
from d4m_plugin.teachers import load_teacher
from tests.toys import Squares

RECIPE = Recipe(ipc=2, num_inference_steps=2)
PARQUET = "train-00000-of-00001.parquet"
NAMES = ["../../x", "/etc", "a\nb", "--- <b>x</b> `|`", "</td><script>alert(1)</script>", "n: [1", "x" * 10_000]


ROW = {"labels": "x", "arm": "y", "images": 1, "bytes": None, "mean": 0.5, "std": None, "diverged": []}


@pytest.fixture
def made(distilled_once, tmp_path):
    return distilled_once(RECIPE, tmp_path / "set")


def told(root):
    """The one sentence that reading a set ends with."""
    with pytest.raises(InputError) as error:
        _ = DistilledDataset(root).images
    assert "\n" not in str(error.value)
    return str(error.value)


def edit(made, *place, to=...):
    """Write another value at a place of d4m.json, or take it out."""
    record = json.loads((made.folder / "d4m.json").read_text())
    inner = record
    for key in place[:-1]:
        inner = inner[key]
    if to is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = to
    (made.folder / "d4m.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("recipe",), ..., "it has no 'recipe'"),
        (("recipe",), [1], r"recipe is \[1\]; it must be a mapping from text to what JSON can hold"),
        (("recipe", "ipc"), "2", "`ipc` is '2'; it must be a whole number"),
        (("recipe", "ipc"), True, "`ipc` is True"),
        (("recipe", "ipc"), 10**9, r"it has 6 rows; it must have 3,000,000,000"),
        (("recipe", "image_size"), 10**9, "6 images of 1,000,000,000 pixels do not fit in memory"),
        (("recipe", "image_size"), 17, "row 0 has 16 by 16 pixels; it must have 17 by 17"),
        (("recipe", "strength"), float("nan"), "`strength` is nan"),
        (
            ("recipe", "seed"),
            2**64,
            "recipe.*seed.* is 18446744073709551616; it must be|`seed` is 18446744073709551616",
        ),
        (("recipe", "class_names"), "/etc/passwd", "`class_names` is '/etc/passwd'; it must be a mapping"),
        (("recipe", "option_of_tomorrow"), 1, "recipe has 'option_of_tomorrow'"),
        (("recipe", "lora"), ..., "recipe lacks 'lora'"),
        (("source", "classes"), "abc", "source.classes is 'abc'; it must be a list of text"),
        (("source", "classes"), ["a", 1, "b"], r"source.classes\[1\] is 1; it must be text"),
        (("source", "classes"), ["a", "\ud800", "b"], r"source.classes\[1\] is '\\ud800'; it must be text"),
        (("source", "classes"), ["a"], "source.classes has fewer than two"),
        (("source", "classes"), ["a"] * 10**5, "it has 6 rows; it must have 200,000"),
        (("source", "arguments"), [], r"source.arguments is \[\]"),
        (("model", "digest"), 1, "model.digest is 1; it must be text or null"),
        (("checksums",), {PARQUET: None}, "checksums.* is None; it must be text"),
        (("labels",), {"teacher": "x"}, "labels has no 'tried'"),
        (("labels",), {"teacher": "x", "tried": "y"}, "column 'logits' is missing; it must be fixed_size_list"),
        (("results",), {"table": []}, "results has no 'caution'"),
        (("format",), 5, "is of format 5, not 4; use the d4m-plugin that wrote it"),
        (("format",), "2", "format is '2'; it must be a whole number"),
    ],
    ids=str,
)
def test_an_edited_record_is_told_by_the_field(made, place, value, says):
    edit(made, *place, to=value)
    sentence = told(made.root)
    assert re.search(says, sentence), sentence
    assert str(made.folder) in sentence


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe\x00", b"[" * 100_000, b'{"format": ' + b"9" * 5000 + b"}"])
def test_a_record_that_is_no_record_is_damaged(made, content):
    (made.folder / "d4m.json").write_bytes(content)
    assert "d4m.json' is damaged" in told(made.root)


@pytest.mark.parametrize("config", ["../../x", "/etc", "ipc-2\0", "..", "*", ""])
def test_a_config_names_a_folder_of_the_set_alone(made, config):
    if config:
        with pytest.raises(InputError, match=r"`config_name` is .* holds ipc-2"):
            DistilledDataset(made.root, config)
    with pytest.raises(InputError, match=r"not a distilled set|no name of the Hub"):
        DistilledDataset("me\0/you" if config else "a\0b")


@pytest.mark.parametrize("name", ['x"); import os; ("', "ipc 2", ".hidden", "a`b", "<b>", "*"])
def test_a_set_whose_folder_is_no_name_of_a_config_is_told(made, name):
    made.folder.rename(made.folder.with_name(name))
    assert "rename it by letters, digits, `.`, `-` and `_`" in told(made.root)


def with_image(table, content):
    cells = table["image"].to_pylist()
    cells[0] = {"bytes": content, "path": "/etc/passwd"}
    return table.set_column(0, table.schema.field(0), pa.array(cells, table.schema.field(0).type))


def encoded(size=(16, 16), mode="RGB", kind="PNG"):
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return file.getvalue()


def header_of(width, height):
    """A PNG that says to be of a size."""
    content = encoded()
    header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


def with_column(name, values, kind=None):
    def change(table):
        place = table.column_names.index(name)
        field = table.schema.field(place) if kind is None else pa.field(name, kind)
        return table.set_column(place, field, pa.array(values, field.type))

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda table: table.drop_columns("weight"), "column 'weight' is missing; it must be float"),
        (lambda table: table.append_column("label", table["label"]), "column 'label' is"),
        (with_column("label", list("abcdef"), pa.string()), "column 'label' is string; it must be int64"),
        (with_column("label", [0, 0, 1, 1, 2, 9]), "column 'label' is not 2 images of each of 3 classes"),
        (with_column("label", [0, 0, 1, 1, 2, None]), "column 'label' has empty cells"),
        (with_column("weight", [float("nan")] * 6), "column 'weight' has shares that are not in"),
        (with_column("weight", [-1.0] * 6), "column 'weight' has shares that are not in"),
        (lambda table: table.slice(0, 5), "it has 5 rows; it must have 6"),
        (lambda table: pa.concat_tables([table] * 2), "it has 12 rows; it must have 6"),
        (lambda table: with_image(table, None), "column 'image' has empty cells"),
        (lambda table: with_image(table, b""), "'row 0' cannot be read as an image"),
        (lambda table: with_image(table, b"no image"), "'row 0' cannot be read as an image"),
        (lambda table: with_image(table, encoded()[:50]), "'row 0' cannot be read as an image"),
        (lambda table: with_image(table, encoded((16, 15))), "row 0 has 16 by 15 pixels; it must have 16 by 16"),
        (lambda table: with_image(table, header_of(60_000, 60_000)), "decompression bomb"),
        (lambda table: with_image(table, header_of(2**31 - 1, 2**31 - 1)), "'row 0' cannot be read as an image"),
    ],
)
def test_a_table_of_another_kind_is_told(made, change, says):
    pq.write_table(change(pq.read_table(made.folder / PARQUET)), made.folder / PARQUET)
    assert says in told(made.root)


def test_logits_have_the_width_of_the_classes(made):
    edit(made, "labels", to={"teacher": "x", "tried": "y"})
    table = pq.read_table(made.folder / PARQUET)
    for width, value, says in ((2, 0.0, "column 'logits' is fixed_size_list"), (3, float("nan"), "no numbers")):
        logits = pa.FixedSizeListArray.from_arrays(pa.array(torch.full((6 * width,), value).half().numpy()), width)
        pq.write_table(table.append_column("logits", logits), made.folder / PARQUET)
        assert says in told(made.root)


def test_of_a_parquet_with_many_rows_in_few_bytes_none_is_decoded(made, monkeypatch):
    row = pq.read_table(made.folder / PARQUET).slice(0, 1)
    pq.write_table(pa.concat_tables([row] * 20_000).combine_chunks(), made.folder / PARQUET)
    assert (made.folder / PARQUET).stat().st_size < 100_000
    monkeypatch.setattr("d4m_plugin.distilled.read_image", lambda *_: pytest.fail("an image is decoded"))
    assert "it has 20,000 rows; it must have 6" in told(made.root)


class Evil:
    """Unpickled, it leaves a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
def test_nothing_is_unpickled(made, squares, tmp_path):
    mark = tmp_path / "mark"
    for name in ("theirs.pt", "theirs.ckpt"):
        torch.save({"images": Evil(mark), "labels": [0], "hyper_parameters": Evil(mark)}, tmp_path / name)
    (tmp_path / "theirs.pth").write_bytes(pickle.dumps(Evil(mark)))
    for name in ("theirs.pt", "theirs.pth"):
        with pytest.raises(InputError, match="does not hold tensors of `images` and `labels`"):
            open_set(str(tmp_path / name), squares)
    with pytest.raises(InputError, match="is no checkpoint of an ImageClassifier"):
        load_teacher(tmp_path / "theirs.ckpt", squares)

    kind = {b"ARROW:extension:name": b"arrow.py_extension_type"}  # pyarrow below 14.0.1 unpickled its metadata
    kind[b"ARROW:extension:metadata"] = pickle.dumps(Evil(mark))
    table = pq.read_table(made.folder / PARQUET)
    field = pa.field("label", pa.int64(), metadata=kind)
    pq.write_table(table.set_column(1, field, table["label"]), made.folder / PARQUET)
    DistilledDataset(made.root)
    assert not mark.exists()


def test_no_other_program_decodes_an_image(made, monkeypatch):
    """Pillow knows an EPS by its first bytes, whatever its name, and has Ghostscript run it."""
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program is run"))
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: True)
    eps = io.BytesIO()
    Image.new("RGB", (16, 16)).save(eps, "EPS")
    with pytest.raises(InputError, match="no format that Pillow knows"):
        read_image(io.BytesIO(eps.getvalue()), "a.png")
    pq.write_table(with_image(pq.read_table(made.folder / PARQUET), eps.getvalue()), made.folder / PARQUET)
    assert "'row 0' cannot be read as an image" in told(made.root)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {},
        lambda tensors: tensors | {"0.latents": torch.zeros(2, 4, 8).half()},
        lambda tensors: tensors | {"0.latents": torch.zeros(1, 4, 8, 8).half()},
        lambda tensors: tensors | {"1.latents": torch.zeros(2, 3, 8, 8).half()},
        lambda tensors: tensors | {"0.weights": torch.zeros(0), "0.latents": torch.zeros(0, 4, 8, 8).half()},
        lambda tensors: tensors | {"0.weights": torch.full((2,), torch.nan)},
        lambda tensors: tensors | {"0.latents": torch.full((2, 4, 8, 8), torch.nan).half()},
        lambda tensors: tensors | {"0.latents": torch.zeros(2, 4, 8, 8, dtype=torch.int64)},
        None,
    ],
)
def test_prototypes_of_another_shape_are_told(made, change):
    file = made.folder / "prototypes.safetensors"
    file.write_bytes(b"\xff" * 100) if change is None else save_file(change(load_file(file)), file)
    with pytest.raises(InputError, match=r"prototypes.safetensors' is missing or damaged \(.*\)\."):
        read_prototypes(file, made.recipe, 3)


@pytest.mark.parametrize(
    "readme",
    [
        b"---\n: [\n---\n",
        b"---\n- a list\n---\n",
        b"---\nconfigs: 3\n---\n",
        b"---\nconfigs: [{data_files: x}]\n---\n",
        b"---\ntags: {a: 1}\n---\n",
        b"---\ndataset_info: [1]\n---\n",
        b"---\nlicense: [1]\n---\n",
        b"\xff\xfe",
        b"---\n1: 2\n---\n",
        b"---\na: " + b"[" * 5000 + b"\n---\n",
    ],
)
def test_a_readme_that_is_no_card_is_told(made, readme):
    with pytest.raises(InputError, match=r"the README.md of the folder .* \(.*\); mend it first\."):
        merged_card(readme, "ipc-2", made.metadata, 1)


def test_a_licence_in_a_broken_card_is_unknown(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert license_of(str(tmp_path), "model") == "unknown"


@pytest.mark.parametrize(
    ("stated", "read", "shown"),
    [
        ("[mit]", "mit", ["mit", "unknown"]),
        ("[mit, cc0-1.0]", "mit, cc0-1.0", ["cc0-1.0", "mit", "unknown"]),
        ("[unknown, unknown]", "unknown", "unknown"),
        ("[]", "unknown", "unknown"),
        ("", "unknown", "unknown"),
    ],
)
def test_a_list_of_licences_is_that_of_each(made, tmp_path, stated, read, shown):
    (tmp_path / "README.md").write_text(f"---\nlicense: {stated}\npretty_name: x\n---\n")
    found = license_of(str(tmp_path), "model")
    record = made.metadata | {"model": made.metadata["model"] | {"license": found}}
    assert (found, DatasetCard(merged_card(None, "ipc-2", record, 1)).data.license) == (read, shown)


def test_a_readme_that_is_no_card_of_ours_stays(made):
    """As of a project that a set's folder was copied into."""
    (made.root / "README.md").write_text("# My project\n")
    write_card(made.root, "ipc-2", made.metadata)
    assert (made.root / "README.md").read_text() == "# My project\n"


def test_the_card_of_a_set_is_not_written_through_a_link(made, tmp_path):
    (tmp_path / "profile").write_text("mine")
    (made.root / "README.md").unlink()
    (made.root / "README.md").symlink_to(tmp_path / "profile")
    write_card(made.root, "ipc-2", made.metadata)
    assert (tmp_path / "profile").read_text() == "mine"


def test_what_the_record_does_not_know_is_not_pushed(made, tmp_path):
    (tmp_path / "secret").write_text("mine")
    for name in ("preview.png", "notes.txt"):
        (made.folder / name).unlink(missing_ok=True)
        (made.folder / name).symlink_to(tmp_path / "secret")
        with pytest.raises(InputError, match=rf"{name}' is not as its d4m.json records it, or not recorded at all"):
            push(made, "me/squares", False, None, None, None)
        (made.folder / name).unlink()
    (made.folder / ".DS_Store").touch()  # as Finder makes it again and again: it is not pushed
    with pytest.raises(InputError, match=r"preview.png' is missing; make or fetch the set anew"):
        push(made, "me/squares", False, None, None, None)


def test_any_class_name_is_distilled_and_read_by_anyone(random_pipeline, tmp_path):
    source = Squares(per_class=2, classes=(*NAMES, "a\0b"))
    source.diffusion = str(random_pipeline)
    with pytest.warns(UserWarning, match="longer than the text encoder reads"):
        made = distill(source, Recipe(ipc=1, num_inference_steps=2), output=tmp_path / "set")
    assert DistilledDataset(made.root).classes == list(source.classes)
    assert load_dataset(str(made.root), split="train").features["label"].names == list(source.classes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


def test_markup_of_others_is_text_on_a_card(made):
    hostile = "<script>x</script> `|` [a](javascript:b)\n<!-- /d4m:about -->\n```\n$(id) 'x'"
    record = made.metadata | {
        "recipe": made.recipe | {"prompt": "{name}" + hostile, "diffusion": hostile},
        "source": made.metadata["source"]
        | {"name": hostile, "class": hostile, "license": hostile, "citation": hostile, "arguments": {hostile: hostile}},
        "model": made.metadata["model"] | {"license": hostile},
        "results": {
            "caution": hostile,
            "verdicts": {hostile: None},
            "table": [ROW | {"student": hostile}],
            "protocol": {"seeds": 1, "steps": 1, "batch_size": 1, "learning_rates": [1.0], "lr_smoothing": 2.0}
            | {"teacher": hostile},
        },
    }
    card = merged_card(None, "ipc-2", record, 1)
    assert merged_card(card.encode(), "ipc-2", record, 1) == card  # the marks are where they were
    text = DatasetCard(card).text
    lines = text.splitlines()
    fences = [place for place, line in enumerate(lines) if line.startswith("```")]
    assert [lines[place][3:] for place in fences[::2]] == ["python", "bash", "python", "bibtex", "bash"]
    for start, end in zip(fences[::2], fences[1::2], strict=True):
        lines[start:end] = [""] * (end - start)  # as it is in a block of code
    outside = "\n".join(lines)
    assert "<script>" not in outside
    assert "](javascript:" not in outside


def test_a_licence_that_is_told_takes_the_place_of_none(made):
    known = made.metadata | {"source": made.metadata["source"] | {"license": "mit"}}
    known["model"] = made.metadata["model"] | {"license": "mit"}
    assert DatasetCard(merged_card(None, "ipc-2", made.metadata, 1)).data.license == "unknown"
    card = merged_card(merged_card(None, "ipc-2", made.metadata, 1).encode(), "ipc-2", known, 1)
    assert DatasetCard(card).data.license == "mit"
    others = made.metadata | {"recipe": made.metadata["recipe"] | {"ipc": 3}}
    card = merged_card(card.encode(), "ipc-3", others, 1)
    assert DatasetCard(card).data.license == ["mit", "unknown"]
    for name in ("ipc-2", "ipc-3"):
        card = merged_card(card.encode(), name, known, 1)
    assert DatasetCard(card).data.license == "mit"


def test_a_command_on_a_card_says_what_the_record_says(made):
    value = "a 'b' $(id)\n\\`id` é 🦆"
    record = made.metadata | {"recipe": made.recipe | {"prompt": "{name}" + value}}
    card = merged_card(None, "ipc-2", record, 1)
    command = card.split("Made again by\n\n```bash\n")[1].split("\n```")[0]
    words = subprocess.run(
        ["bash", "-c", command.replace("d4m distill", "printf '%s\\0'")], capture_output=True, text=True, check=True
    ).stdout.split("\0")
    assert words[words.index("--prompt") + 1] == "{name}" + value


@pytest.mark.parametrize(
    "held",
    [
        {"images": torch.zeros(0, 3, 8, 8), "labels": torch.zeros(0)},
        {"images": torch.zeros(1, 3, 0, 8), "labels": [0]},
        {"images": torch.zeros(1, 1, 1, 1).expand(10**6, 3, 1000, 1000), "labels": torch.zeros(1).expand(10**6)},
        {"images": torch.full((1, 3, 8, 8), torch.nan), "labels": [0]},
        {"images": torch.full((1, 3, 8, 8), 300), "labels": [0]},
        {"images": torch.zeros(1, 3, 8, 8).to_sparse(), "labels": [0]},
        {"images": torch.zeros(1, 3, 8, 8), "labels": [3]},
        {"images": torch.zeros(1, 3, 8, 8), "labels": ["a"]},
        {"images": "x", "labels": "y"},
        [1, 2, 3],
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_a_file_of_other_tensors_is_told(squares, tmp_path, held):
    torch.save(held, tmp_path / "theirs.pt")
    with pytest.raises(InputError, match=r"`distilled_set` is '.*theirs.pt', w"):
        open_set(str(tmp_path / "theirs.pt"), squares)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("student", {"student": "resnet18", "num_classes": 10**12, "image_size": 16}),
        ("student", {"student": "convnet", "num_classes": 3, "image_size": 10**9}),
        ("student", {"student": "os.system", "num_classes": 3, "image_size": 16}),
        ("student", {"student": ["convnet"], "num_classes": 3, "image_size": 16}),
        ("student", [1]),
        ("data", {"classes": ["a"], "mean": [0.5] * 3, "std": [0.5] * 3}),
        ("data", {"classes": ["a", "b", "c"], "mean": [0.5], "std": [0.5] * 3}),
        ("data", {"classes": ["a", "b", "c"]}),
    ],
)
def test_a_teacher_of_another_description_is_told(squares, tmp_path, part, value):
    metadata = {
        "student": {"student": "convnet", "num_classes": 3, "image_size": 16},
        "data": {"classes": ["a", "b", "c"], "mean": [0.5] * 3, "std": [0.5] * 3},
    }
    file = tmp_path / "a.safetensors"
    save_file(
        {"x": torch.zeros(1)}, file, {name: json.dumps(each) for name, each in (metadata | {part: value}).items()}
    )
    with pytest.raises(InputError, match=r"`teacher` is '.*a.safetensors', w") as error:
        load_teacher(file, squares)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "parts",
    [
        {"_class_name": ["pipeline", "Theirs"]},
        {"_class_name": None},
        {"unet": ["theirs", "Theirs"]},
        {"unet": ["os", "system"]},
        {"unet": 3},
    ],
    ids=str,
)
def test_a_diffusion_model_brings_no_code(random_pipeline, tmp_path, parts):
    folder = shutil.copytree(random_pipeline, tmp_path / "theirs")
    for file in ("pipeline.py", "theirs.py", "unet/theirs.py"):
        (folder / file).write_text(f"import os\nos.mkdir({str(tmp_path / 'mark')!r})\nclass Theirs: pass\n")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | parts))
    with pytest.raises(InputError, match=r"`diffusion` is '.*theirs', which is no loadable image-to-image model"):
        LatentDiffusion(str(folder))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "options",
    [{"num_train_timesteps": "x"}, {"beta_start": [1]}, {"beta_schedule": "x"}, {"clip_sample": {}, "nope": 1}],
)
def test_options_that_a_scheduler_cannot_use_are_told(random_pipeline, options):
    with pytest.raises(InputError, match=r"`scheduler_options` (is|has) .*, which DDIMScheduler (cannot|does not)"):
        LatentDiffusion(str(random_pipeline), scheduler_options=options)


def test_a_source_of_odd_names_is_indexed_inside_its_folder(tmp_path):
    for name in ("a\nb", "<b>", "x" * 200):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (16, 16)).save(tmp_path / "photos" / name / f"{number}.png")
    assert len(ImageFolder(tmp_path / "photos").classes) == 3


def test_a_checkpoint_that_would_run_code_is_not_read(tmp_path, monkeypatch, capsys):
    torch.save({"state_dict": Evil(tmp_path / "mark")}, tmp_path / "theirs.ckpt")
    monkeypatch.setattr(sys, "argv", ["d4m", "validate", "--ckpt_path", str(tmp_path / "theirs.ckpt")])
    with pytest.raises(SystemExit):
        cli.d4m()
    assert "error: the checkpoint is damaged, or holds more than tensors" in capsys.readouterr().err
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("share", [0, 0.5])
def test_a_checkpoint_that_is_cut_off_is_told_in_a_sentence(tmp_path, monkeypatch, capsys, share):
    file = tmp_path / "half.ckpt"
    torch.save({"state_dict": {"weight": torch.zeros(1000)}}, file)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    monkeypatch.setattr(sys, "argv", ["d4m", "validate", "--ckpt_path", str(file)])
    with pytest.raises(SystemExit):
        cli.d4m()
    assert "error: the checkpoint is damaged, or holds more than tensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"no parquet", "which `datasets` cannot open"),
        (None, "`label_column` is 'label', which holds 7, but names 2"),
    ],
)
def test_a_source_of_a_file_of_another_kind_is_told(tmp_path, content, says):
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=["a", "b"])})
    table = pa.table({"image": [{"bytes": encoded(), "path": None}] * 2, "label": [0, 7]}, features.arrow_schema)
    pq.write_table(table, tmp_path / "theirs.parquet")
    if content:
        (tmp_path / "theirs.parquet").write_bytes(content)
    with pytest.raises(InputError, match=says):
        HuggingFace(tmp_path / "theirs.parquet")


@pytest.mark.parametrize(
    "words", [["evaluate", "set"], ["relabel", "set"], ["push", "set", "me/x"], ["fit", "--data.set_folder", "set"]]
)
def test_every_command_tells_of_a_strangers_set_in_one_line(made, monkeypatch, capsys, words):
    edit(made, "source", "classes", to=["\x1b[31mred\n", 2])
    monkeypatch.chdir(made.root.parent)
    monkeypatch.setattr(sys, "argv", ["d4m", *words])
    with pytest.raises(SystemExit) as end:
        cli.d4m()
    errors = [line for line in capsys.readouterr().err.splitlines() if line]
    assert end.value.code == 2
    assert len(errors) == 1
    assert "d4m.json' is damaged or edited: source.classes[1] is 2; it must be text." in errors[0]


def test_a_terminals_commands_are_shown_not_obeyed(capsys):
    with pytest.raises(SystemExit):
        console.fail("a\n\x1b[31mb \ud800")
    assert capsys.readouterr().err == "error: a \\x1b[31mb \\ud800\n"
