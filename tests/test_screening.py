from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from d4m_plugin import D4MDataModule, HuggingFace, ImageClassifier, ImageFolder, InputError, Recipe, distill
from d4m_plugin.errors import InputWarning
from d4m_plugin.screening import readable_source
from d4m_plugin.subsets import random_subset
from tests.toys import Squares

pytestmark = pytest.mark.filterwarnings("ignore:.* cannot be read and are left out")


@pytest.fixture
def folder(tmp_path):
    """Two classes of ten training and four test files; of the former three are broken, of the latter one."""
    generator = np.random.default_rng(0)
    root = tmp_path / "pets"
    for split, count in (("train", 10), ("test", 4)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(generator.integers(0, 256, (16, 16, 3), np.uint8))
                image.save(root / split / name / f"{number:02}.jpg")
    (root / "train" / "cat" / "03.jpg").write_bytes(b"no image")
    whole = (root / "train" / "dog" / "04.jpg").read_bytes()
    (root / "train" / "dog" / "04.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "train" / "dog" / "05.jpg").write_bytes(b"")
    (root / "test" / "dog" / "01.jpg").write_bytes(b"")
    return root


def recipe(random_pipeline):
    return Recipe(diffusion=str(random_pipeline), ipc=2, num_inference_steps=2, image_size=16)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_files_are_listed_before_the_work(folder, random_pipeline, num_workers, monkeypatch):
    source = ImageFolder(folder)
    monkeypatch.setattr("d4m_plugin.distillation.encode", lambda *_: pytest.fail("work began"))
    with pytest.raises(InputError) as caught:
        distill(source, recipe(random_pipeline), num_workers=num_workers)
    message = str(caught.value)
    assert message.startswith("3 of 20 training images of pets cannot be read.")
    assert all(name in message for name in ("cat/03.jpg", "dog/04.jpg", "dog/05.jpg"))
    assert "set `skip_bad_images` to true" in message


def test_bad_files_can_be_left_out_and_are_recorded(folder, random_pipeline):
    with pytest.warns(InputWarning, match=r"3 of 20 training images cannot be read and are left out; '.*' lists them"):
        made = distill(ImageFolder(folder), recipe(random_pipeline), skip_bad_images=True)
    card = (Path(made.root) / "README.md").read_text(encoding="utf-8")
    assert (card.count("--skip_bad_images true"), card.count("--data.skip_bad_images true")) == (1, 1)
    skipped = made.metadata["source"]["skipped"]
    assert len(skipped) == 3
    assert all(name in line for name, line in zip(("03.jpg", "04.jpg", "05.jpg"), skipped, strict=True))
    assert made.metadata["source"]["classes"] == ["cat", "dog"]


def test_the_record_of_what_is_left_out_does_not_say_where_it_lay(folder, random_pipeline, monkeypatch):
    monkeypatch.chdir(folder.parent)  # of images in files `datasets` gives whole paths
    made = distill(HuggingFace(folder.name), recipe(random_pipeline), skip_bad_images=True)
    skipped = made.metadata["source"]["skipped"]
    assert len(skipped) == 3
    assert not [fault for fault in skipped if str(folder.parent) in fault]


def test_the_bytes_told_are_those_of_the_images_that_are_left(folder, tmp_path):
    sizes = [path.stat().st_size for path in sorted((folder / "train").rglob("*.jpg"))]
    source = readable_source(ImageFolder(folder), True, tmp_path / "cache", 0)
    assert list(source.stored_bytes()) == [size for n, size in enumerate(sizes) if n not in (3, 14, 15)]


def test_images_are_read_once_and_what_was_mended_is_found_mended(folder, random_pipeline):
    source = ImageFolder(folder)
    with pytest.raises(InputError, match="3 of 20"):
        distill(source, recipe(random_pipeline))
    for name in ("cat/03.jpg", "dog/05.jpg"):
        Image.new("RGB", (16, 16)).save(folder / "train" / name)
    reads = []
    read, rows = type(source.train()).__getitem__, type(source.train())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "__getitem__", lambda self, index: reads.append(index) or read(self, index))
        with pytest.raises(InputError, match=r"1 of 20 training images of pets cannot be read. .*dog/04.jpg"):
            distill(source, recipe(random_pipeline))
    assert len(reads) == 3


@pytest.mark.parametrize("train_on", ["real", "random"])
def test_the_data_module_trains_and_tests_without_bad_files(folder, train_on):
    data = D4MDataModule(ImageFolder(folder), train_on=train_on, ipc=2, skip_bad_images=True)
    assert sum(len(labels) for _, labels in data.train_dataloader()) == (17 if train_on == "real" else 4)
    assert sum(len(labels) for _, labels in data.val_dataloader()) == 7


def test_a_bad_test_file_is_named_before_the_long_work(folder, random_pipeline, monkeypatch):
    monkeypatch.setattr("d4m_plugin.datamodules.d4m.distill", lambda *_, **__: pytest.fail("work began"))
    data = D4MDataModule(ImageFolder(folder), ipc=2, diffusion=str(random_pipeline))
    trainer = L.Trainer(max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(InputError, match=r"1 of 8 test images of pets cannot be read. '.*test/dog/01.jpg'"):
        trainer.fit(ImageClassifier(2, 16), datamodule=data)


@pytest.mark.parametrize("train_on", ["real", "random"])
def test_a_bad_training_file_is_named_when_real_images_are_trained_on(folder, train_on):
    data = D4MDataModule(ImageFolder(folder), train_on=train_on, ipc=10)
    with pytest.raises(InputError, match=r"3 of 20 training images of pets cannot be read"):
        data.train_dataloader()


def test_the_first_pass_leaves_the_random_state_alone(folder):
    state = torch.get_rng_state()
    data = D4MDataModule(ImageFolder(folder), train_on="real", skip_bad_images=True)
    assert len(data.training_set) == 17
    assert torch.equal(state, torch.get_rng_state())


def test_a_source_is_the_same_however_its_path_is_spelled(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder.parent)
    paths = (folder, folder.name, f"./{folder.name}")
    prints = {readable_source(ImageFolder(path), True, tmp_path / "cache", 0).fingerprint for path in paths}
    assert len(prints) == 1
    assert prints != {ImageFolder(folder).fingerprint}


def test_a_set_without_skipped_images_is_another_set(folder, random_pipeline):
    made = distill(ImageFolder(folder), recipe(random_pipeline), skip_bad_images=True)
    with pytest.raises(InputError, match="3 of 20"):
        distill(ImageFolder(folder), recipe(random_pipeline))
    for name in ("cat/03.jpg", "dog/04.jpg", "dog/05.jpg"):
        (folder / "train" / name).unlink()
    mended = distill(ImageFolder(folder), recipe(random_pipeline), skip_bad_images=True)
    assert mended.root != made.root


def test_a_test_split_that_changes_is_read_anew(folder):
    data = D4MDataModule(ImageFolder(folder), skip_bad_images=True)
    assert len(data.source.test()) == 7
    (folder / "test" / "cat" / "00.jpg").write_bytes(b"broken since")
    data = D4MDataModule(ImageFolder(folder), skip_bad_images=True)
    assert len(data.source.test()) == 6


class Opened(Squares):
    """Of the user's own making: files are opened and not read."""

    def __init__(self, folder):
        super().__init__(per_class=2, classes=("cat", "dog"))
        self.folder = folder

    def train(self):
        return OpenedFiles(sorted((self.folder / "train").rglob("*.jpg")))


class OpenedFiles:
    def __init__(self, paths):
        self.paths, self.targets = paths, [int(path.parent.name == "dog") for path in paths]

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return Image.open(self.paths[index]), self.targets[index]


def test_files_that_a_source_only_opens_are_read(folder, random_pipeline):
    with pytest.raises(InputError, match=r"3 of 20 training images of opened cannot be read\. Image 3 cannot be read"):
        distill(Opened(folder), recipe(random_pipeline))
    made = distill(Opened(folder), recipe(random_pipeline), skip_bad_images=True)
    assert [line.split(" cannot")[0] for line in made.metadata["source"]["skipped"]] == [
        "Image 3",
        "Image 14",
        "Image 15",
    ]


def test_the_licence_is_read_when_it_is_asked_for(folder, tmp_path):
    asked = []

    class OfTheHub(ImageFolder):
        @property
        def license(self):
            asked.append(self)
            return "mit"

    source = readable_source(OfTheHub(folder), True, tmp_path / "cache", 0)
    assert not asked
    assert source.license == "mit"


@pytest.mark.parametrize("content", [b"", b"garbage", b'{"checksum": "", "row": {"99": "bad"}}', bytes(range(256))])
def test_a_damaged_list_is_told_and_the_images_are_checked_again(folder, tmp_path, content):
    source = readable_source(ImageFolder(folder), True, tmp_path / "cache", 0)
    assert len(source.skipped) == 3
    (file,) = (tmp_path / "cache" / "screened").glob("*.json")
    file.write_bytes(content)
    with pytest.warns(InputWarning, match=r"The images are checked again\."):
        assert readable_source(ImageFolder(folder), True, tmp_path / "cache", 0).skipped == source.skipped


def test_a_random_draw_says_nothing_of_the_other_images(folder):
    source, bad = ImageFolder(folder), {3, 14, 15}
    seed = next(s for s in range(99) if not bad & set(random_subset(source, 2, s).indices.tolist()))
    assert len(D4MDataModule(source, train_on="random", ipc=2, seed=seed).training_set) == 4
    with pytest.raises(InputError, match="3 of 20"):
        _ = D4MDataModule(source, train_on="real").training_set
