"""What strangers send, mutated: each reader returns something consistent, or says in one sentence what is wrong.

A few examples by default; many with `--hypothesis-profile=long --hypothesis-show-statistics`, which counts them.
"""

import io
import json
import os
import shutil
import sys
import tempfile
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from d4m_plugin import DistilledDataset, InputError, Recipe, distill
from d4m_plugin.card import merged_card, write_card
from d4m_plugin.distilled import read_prototypes
from d4m_plugin.evaluation.runs import Row
from d4m_plugin.evaluation.sets import open_set
from d4m_plugin.hub import card_of
from d4m_plugin.models.classifier import ImageClassifier
from d4m_plugin.teachers import load_teacher, save_teacher
from d4m_plugin.units import _checksum_of_row, load_json
from tests.toys import Squares

EXECUTES = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class"}
WRITES = os.O_WRONLY | os.O_RDWR
NASTY = [
    "../../x",
    "/etc/passwd",
    "a\0b",
    ".hidden",
    "a/b",
    "-->",
    "<script>",
    "a\nb",
    "`|[x](y)",
    "'; ls",
    "\ud800",
    "9" * 5000,
]

_watched: dict[str, Path] = {}  # the only folder that may be written, while a stranger's file is read
_broken: list[str] = []


def _audit(event, arguments):
    if not _watched:  # or gone, at the interpreter's end
        return
    if event in EXECUTES:
        _broken.append(f"{event} {arguments!r}")
    if event == "open" and isinstance(arguments[0], str) and arguments[2] & WRITES:
        path = Path(os.path.realpath(arguments[0]))
        if not path.is_relative_to(_watched["folder"]) and path != Path(os.devnull):
            _broken.append(f"{path} is written")


sys.addaudithook(_audit)


@contextmanager
def watched(folder):
    """Fail where code of ours runs a program, unpickles a class, or writes outside a folder."""
    _broken.clear()
    _watched["folder"] = Path(folder).resolve()
    try:
        yield
    finally:
        _watched.clear()
    assert not _broken


@pytest.fixture(scope="module")
def source(random_pipeline):
    source = Squares()
    source.diffusion = str(random_pipeline)
    return source


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    recipe = Recipe(ipc=2, num_inference_steps=2)
    made = distill(source, recipe, output=folder / "set", cache_dir=folder / "cache")
    results = {
        "caution": "Some may be in it.",
        "verdicts": {"It is better.": "better"},
        "table": [
            {
                "student": "convnet",
                "labels": "hard",
                "arm": "random",
                "images": 6,
                "bytes": 99,
                "mean": 0.5,
                "std": None,
                "diverged": [],
            }
        ],
        "protocol": {
            "seeds": 1,
            "steps": 2,
            "batch_size": 3,
            "learning_rates": [0.001],
            "lr_smoothing": 1.0,
            "teacher": "digits",
        },
    }
    labels = {"teacher": "digits", "tried": "names 99%"}
    record = made.metadata | {"results": results, "labels": labels}
    (made.folder / "d4m.json").write_text(json.dumps(record), encoding="utf-8")
    parquet = made.folder / "train-00000-of-00001.parquet"
    table = pq.read_table(parquet)
    logits = pa.FixedSizeListArray.from_arrays(pa.array(torch.zeros(18).half().numpy()), 3)
    pq.write_table(table.append_column("logits", logits), parquet)
    write_card(Path(made.root), made.folder.name, record)
    return DistilledDataset(made.root)


@contextmanager
def copy_of(made):
    """A copy of a set in a folder of its own; that folder alone is written."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(shutil.copytree(made.root, Path(folder) / "set"))
        with watched(folder):
            yield root / made.folder.name


def check_reading(folder):
    """Read a set; where it can be read, what it holds fits together, and its card can be written and read."""
    try:
        dataset = DistilledDataset(folder.parent)
        _ = dataset.images
    except InputError as error:
        assert_one_sentence(error)
        return
    classes, size = len(dataset.classes), dataset.recipe["image_size"]
    assert dataset.images.shape == (classes * dataset.recipe["ipc"], 3, size, size)
    assert len(dataset.images) == len(dataset.targets) == len(dataset.weights)
    assert set(dataset.targets) == set(range(classes))
    assert dataset.logits is None or dataset.logits.shape == (len(dataset), classes)
    check_card(None, dataset.folder.name, dataset.metadata)


def check_card(card, config, record):
    """Merge a set into a card; where that can be done, it can be done again, and changes nothing of a card of ours."""
    try:
        text = merged_card(card, config, record, 100)
    except InputError as error:
        assert_one_sentence(error)
        assert card is not None
        return
    again = merged_card(text.encode(), config, record, 100)
    assert card is not None or again == text
    assert f"<!-- d4m:{config} -->" in again
    assert config in [each["config_name"] for each in card_of(again.encode(), "it").data.configs]


def assert_one_sentence(error):
    assert "\n" not in str(error)
    assert 20 < len(str(error)) < 2000


mutations = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "delete", "overwrite", "truncate", "repeat"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=40),
    ),
    min_size=1,
    max_size=4,
)


def mutated(content, changes):
    for kind, share, data in changes:
        place = int(share * len(content))
        before, after = content[:place], content[place:]
        if kind == "flip":
            content = before + bytes(byte ^ data[0] for byte in after[:1]) + after[1:]
        elif kind == "insert":
            content = before + data + after
        elif kind == "delete":
            content = before + after[len(data) :]
        elif kind == "overwrite":
            content = before + data + after[len(data) :]
        elif kind == "truncate":
            content = before
        else:
            content = before + after[: 4 * len(data)] + after
    return content


words = st.sampled_from(NASTY) | st.text(st.characters(exclude_categories=()), max_size=20)
numbers = st.integers() | st.sampled_from([2**31, 2**63, 10**400, -1, 0]) | st.floats()
leaves = st.none() | st.booleans() | numbers | words
anything = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3))


def places_in(value, place=()):
    """Every place in JSON, the whole too."""
    yield place
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places_in(each, (*place, key))


def edited(value, place, new):
    """JSON with another value at a place, or without it."""
    if not place:
        return new
    value = value.copy()
    if new is ... and len(place) == 1:
        del value[place[0]]
    else:
        value[place[0]] = edited(value[place[0]], place[1:], new)
    return value


def edits_of(value):
    places = st.sampled_from([place for place in places_in(value) if place])
    return st.lists(st.tuples(places, anything | st.just(...)), min_size=1, max_size=3)


def with_edits(value, edits):
    for place, new in edits:
        with suppress(KeyError, IndexError, TypeError, AttributeError):  # an earlier edit took the place away
            value = edited(value, place, new)
    return value


@given(st.data())
def test_an_edited_record_is_read_or_told(made, data):
    edits = data.draw(edits_of(made.metadata))
    with copy_of(made) as folder:
        (folder / "d4m.json").write_text(json.dumps(with_edits(made.metadata, edits)))
        check_reading(folder)


@given(changes=mutations, name=st.sampled_from(["d4m.json", "train-00000-of-00001.parquet"]))
def test_damaged_bytes_are_read_or_told(made, changes, name):
    with copy_of(made) as folder:
        (folder / name).write_bytes(mutated((folder / name).read_bytes(), changes))
        check_reading(folder)


def png(size, mode="RGB", kind="PNG"):
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return file.getvalue()


def bomb():
    """A PNG whose header tells of 60,000 by 60,000 pixels."""
    content = png((16, 16))
    header = b"IHDR" + (60_000).to_bytes(4) * 2 + content[24:29]
    return content[:12] + header + zlib.crc32(header).to_bytes(4) + content[33:]


IMAGES = [None, b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n", bomb(), png((16, 16)), png((16, 17))]
IMAGES += [png((16, 16), mode) for mode in ("L", "P", "RGBA", "1", "LA", "I;16")]
IMAGES += [png((16, 16), "RGB", kind) for kind in ("JPEG", "GIF", "BMP", "WEBP", "TIFF", "ICO", "PPM")]
cells = {
    "image": st.sampled_from(IMAGES) | st.binary(max_size=100),
    "label": st.none() | st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 4),
    "weight": st.none() | st.floats(width=32),
    "logits": st.none() | st.lists(st.floats(width=16), min_size=3, max_size=3),
}
TYPES = [pa.string(), pa.int8(), pa.float64(), pa.binary(), pa.list_(pa.float16()), pa.struct({"bytes": pa.binary()})]


@st.composite
def tables(draw, table):
    """A set's table with other cells, other rows, and perhaps a column of another type or none."""
    for name, row in draw(st.lists(st.tuples(st.sampled_from([*cells]), st.integers(0, 5)), max_size=4)):
        values = table[name].to_pylist()
        values[row] = draw(cells[name])
        if name == "image" and (values[row] is not None or draw(st.booleans())):
            values[row] = {"bytes": values[row], "path": draw(st.none() | st.sampled_from(["/etc/passwd", "x.png"]))}
        place = table.column_names.index(name)
        table = table.set_column(place, table.schema.field(place), pa.array(values, table.schema.field(place).type))
    for kind in draw(st.lists(st.sampled_from(["type", "drop", "twice", "rows"]), max_size=1)):
        place = draw(st.integers(0, table.num_columns - 1))
        name = table.column_names[place]
        if kind == "type":
            table = table.set_column(place, name, pa.nulls(len(table), draw(st.sampled_from(TYPES))))
        elif kind == "drop":
            table = table.remove_column(place)
        elif kind == "twice":
            table = table.append_column(name, table[place])
        else:
            table = table.take(pa.array(draw(st.lists(st.integers(0, len(table) - 1), max_size=20)), pa.int64()))
    return table


@given(st.data())
def test_any_table_is_read_or_told(made, data):
    table = data.draw(tables(pq.read_table(made.folder / "train-00000-of-00001.parquet")))
    with copy_of(made) as folder:
        pq.write_table(table, folder / "train-00000-of-00001.parquet")
        check_reading(folder)


@given(changes=mutations)
def test_damaged_prototypes_are_read_or_told(made, changes):
    with copy_of(made) as folder:
        file = folder / "prototypes.safetensors"
        file.write_bytes(mutated(file.read_bytes(), changes))
        check_prototypes(file, made)


shapes = st.lists(st.integers(0, 5), max_size=5)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool])


@given(st.data())
def test_prototypes_of_any_shape_are_read_or_told(made, data):
    with copy_of(made) as folder:
        file = folder / "prototypes.safetensors"
        tensors = load_file(file)
        for name in data.draw(st.lists(st.sampled_from([*tensors, "9.latents"]), max_size=2)):
            tensors[name] = torch.zeros(data.draw(shapes), dtype=data.draw(dtypes))
        save_file(tensors, file)
        check_prototypes(file, made)


def check_prototypes(file, made):
    try:
        found = read_prototypes(file, made.recipe, len(made.classes))
    except InputError as error:
        assert_one_sentence(error)
        return
    assert len(found) == len(made.classes)
    assert len({each.latents.shape[1:] for each in found}) == 1
    assert all(len(each.latents) == len(each.weights) for each in found)


@given(st.data())
def test_any_readme_is_kept_or_told(made, data):
    content = (Path(made.root) / "README.md").read_bytes()
    if data.draw(st.booleans()):
        content = mutated(content, data.draw(mutations))
    else:
        fields = with_edits(vars(card_of(content, "it").data), data.draw(edits_of(vars(card_of(content, "it").data))))
        content = f"---\n{yaml.dump(fields)}\n---\n{data.draw(words)}".encode(errors="surrogatepass")
    with watched("nowhere"):
        check_card(content, made.folder.name, made.metadata)


@given(st.data())
def test_any_record_of_a_training_is_read_or_told(data):
    row = {"arm": "real", "labels": "hard", "student": "convnet", "seed": 0, "lr": 1e-3, "choosing": False}
    row |= {"accuracy": 0.5, "accuracies": [0.5, None], "confusion": [[1, 0], [0, 1]], "losses": [[1, 0.5]]}
    row |= {"seconds": 1.5}
    with tempfile.TemporaryDirectory() as folder, watched(folder):
        path = Path(folder) / "training.json"
        edited = with_edits(row, data.draw(edits_of(row)))
        path.write_text(json.dumps({"row": edited, "checksum": _checksum_of_row(path.name, edited)}))
        if data.draw(st.booleans()):
            path.write_bytes(mutated(path.read_bytes(), data.draw(mutations)))
        try:
            found = load_json(path, Row)
        except InputError as error:
            assert_one_sentence(error)
        else:
            assert isinstance(found["accuracy"], float | int | None)


@given(st.dictionaries(st.sampled_from([*Recipe.__annotations__]), anything, max_size=3))
def test_any_option_makes_a_recipe_or_is_told(options):
    with watched("nowhere"):
        try:
            recipe = Recipe(**options)
        except InputError as error:
            assert_one_sentence(error)
        else:
            json.dumps(vars(recipe)).encode()


@pytest.fixture(scope="module")
def teachers(source, tmp_path_factory):
    """A teacher in a checkpoint and in a safetensors file."""
    folder = tmp_path_factory.mktemp("teachers")
    student = ImageClassifier(3, 16)
    checkpoint = {
        "hyper_parameters": dict(student.hparams),
        "state_dict": student.state_dict(),
        "data": {"classes": list(source.classes), "mean": [0.5] * 3, "std": [0.5] * 3},
    }
    torch.save(checkpoint, folder / "a.ckpt")
    save_teacher(folder / "a.ckpt", folder / "a.safetensors")
    return folder


@given(name=st.sampled_from(["a.ckpt", "a.safetensors"]), changes=mutations)
def test_a_damaged_teacher_is_loaded_or_told(teachers, source, name, changes):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.write_bytes(mutated((teachers / name).read_bytes(), changes))
        with watched(folder):
            try:
                load_teacher(file, source)(torch.zeros(1, 3, 16, 16))
            except InputError as error:
                assert_one_sentence(error)


@given(st.data())
def test_a_teacher_of_any_description_is_loaded_or_told(teachers, source, data):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.ckpt"
        checkpoint = torch.load(teachers / "a.ckpt", weights_only=True)
        for part in ("hyper_parameters", "data"):
            checkpoint[part] = with_edits(checkpoint[part], data.draw(edits_of(checkpoint[part])))
        torch.save(checkpoint, file)
        with watched(folder):
            try:
                load_teacher(file, source)(torch.zeros(1, 3, 16, 16))
            except InputError as error:
                assert_one_sentence(error)


held = st.fixed_dictionaries(
    {
        "images": st.builds(
            lambda shape, kind, value: torch.full(shape, value).to(kind),
            st.just([4, 3, 8, 8]) | shapes,
            st.sampled_from([torch.uint8, torch.float32, torch.int64, torch.bool, torch.complex64]),
            st.floats(width=32) | st.sampled_from([0.0, 1.0]),
        ),
        "labels": st.lists(st.integers(-1, 4), max_size=5) | anything,
    }
)


@given(held=held | anything, changes=st.just([]) | mutations)
def test_any_file_of_tensors_is_read_or_told(source, held, changes):
    file = io.BytesIO()
    torch.save(held, file)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "theirs.pt"
        path.write_bytes(mutated(file.getvalue(), changes))
        with watched(folder):
            try:
                judged = open_set(str(path), source)
            except InputError as error:
                assert_one_sentence(error)
            else:
                assert sum(judged.counts) == len(judged.squares) > 0
                assert judged.squares.pixels.shape[1:] == (3, 16, 16)
