import pickle
import signal
import warnings
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from d4m_plugin import D4MDataModule, ImageClassifier, ImageFolder, InputError, Recipe, distill
from d4m_plugin.errors import InputWarning
from d4m_plugin.sources.images import to_pixels
from tests.toys import Squares

RECIPE = {"ipc": 2, "num_inference_steps": 2}


def quiet_trainer(**options):
    return L.Trainer(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options
    )


def test_what_a_model_needs_is_known_at_construction():
    data = D4MDataModule(Squares())
    assert (data.num_classes, data.image_size) == (3, 16)
    assert D4MDataModule(Squares(), image_size=8).image_size == 8


def test_batches_are_distilled_images_augmented_and_normalised(squares):
    data = D4MDataModule(squares, batch_size=4, **RECIPE)
    batches = list(data.train_dataloader())
    assert [len(labels) for _, labels in batches] == [4, 2]
    pixels, labels = batches[0]
    assert (pixels.shape, pixels.dtype, labels.dtype) == ((4, 3, 16, 16), torch.uint8, torch.int64)
    images = data.augmented(pixels)
    assert (images.shape, images.dtype) == ((4, 3, 16, 16), torch.float32)
    pixels = data.to_unit_range(images)
    assert pixels.min() > -0.01
    assert pixels.max() < 1.01


def test_without_crop_and_flip_the_distilled_pixels_come_back(squares):
    data = D4MDataModule(squares, crop_scale=(1.0, 1.0), flip=False, **RECIPE)
    ((images, labels),) = data.train_dataloader()
    pixels = (data.to_unit_range(data.augmented(images)) * 255).round().to(torch.uint8)
    found = {(label, *image.flatten().tolist()) for image, label in zip(pixels, labels.tolist(), strict=True)}
    stored = zip(data.distilled.images, data.distilled.targets, strict=True)
    assert found == {(label, *image.flatten().tolist()) for image, label in stored}


def test_validation_and_test_are_the_real_test_images(squares):
    data = D4MDataModule(squares, batch_size=5)
    test = squares.test()
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
        assert labels.tolist() == test.targets
        assert (images.permute(0, 2, 3, 1).numpy() == test.pixels).all()
        pixels = (data.to_unit_range(data.normalised(images)) * 255).round()
        assert torch.equal(pixels.to(torch.uint8), images)


def test_images_that_are_no_bytes_are_not_normalised_again(squares):
    class Own(D4MDataModule):
        def val_dataloader(self):
            return DataLoader([(torch.rand(3, 16, 16), 0)])

    trainer = L.Trainer(logger=False, enable_progress_bar=False, barebones=True)
    with pytest.raises(InputError, match=r"images of a batch are torch.float32, before .* it takes them as uint8"):
        trainer.validate(ImageClassifier(3, 16), datamodule=Own(squares, train_on="random", ipc=1))


def test_training_images_are_augmented_and_others_only_normalised(squares):
    """By what the trainer hands to the module's steps."""
    seen = {}

    class Sees(ImageClassifier):
        def training_step(self, batch, batch_idx):
            seen["train"] = batch[0]
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            seen["val"] = batch[0]
            super().validation_step(batch, batch_idx)

    half = (0.08, 0.5)  # at most, or a crop may by chance be the whole image
    data = D4MDataModule(squares, train_on="real", batch_size=18, crop_scale=half)
    trainer = quiet_trainer(max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(Sees(3, 16), datamodule=data)
    torch.testing.assert_close(seen["val"], data.normalised(torch.cat([x for x, _ in data.val_dataloader()])))
    stored = {tuple(image.flatten().tolist()) for image in data.normalised(next(iter(data.train_dataloader()))[0])}
    assert not stored & {tuple(image.flatten().tolist()) for image in seen["train"]}


def test_images_of_other_sizes_are_cropped_from_the_whole_by_the_loader(tmp_path):
    for split in ("train", "val"):
        for name, colour in (("a", "red"), ("b", "blue")):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (40, 20), colour).save(tmp_path / split / name / "wide.png")
    whole = D4MDataModule(ImageFolder(tmp_path), train_on="real", crop_scale=(1.0, 1.0))
    ((images, _),) = whole.train_dataloader()
    assert (images.shape, images.dtype) == ((2, 3, 20, 20), torch.uint8)
    assert torch.equal(whole.augmented(images), whole.normalised(images))
    few = D4MDataModule(ImageFolder(tmp_path), train_on="random", ipc=1)
    assert few._held_training_set.tensors[0].shape == (2, 3, 20, 20)


@pytest.mark.parametrize(("weighting", "power"), [("share", 1.0), ("root", 0.5)])
def test_images_are_drawn_by_their_prototypes_share_of_the_class(squares, weighting, power):
    torch.manual_seed(0)
    data = D4MDataModule(
        squares, weighting=weighting, ipc=3, num_inference_steps=2, batch_size=9, crop_scale=(1, 1), flip=False
    )
    stored = data.distilled
    drawn = torch.zeros(9)
    for _ in range(400):
        for images, _ in data.train_dataloader():
            drawn += (images[:, None] == stored.images).flatten(2).all(2).sum(0)
    expected = (stored.weights**power).view(3, 3)
    expected /= expected.sum(1, keepdim=True)
    torch.testing.assert_close((drawn / drawn.sum() * 3).view(3, 3), expected, atol=0.04, rtol=0)
    assert stored.weights.std() > 0.05  # the shares do differ


def test_real_takes_every_training_image_and_random_ipc_of_each_class(squares):
    real = D4MDataModule(squares, train_on="real", **RECIPE)
    assert sum(len(labels) for _, labels in real.train_dataloader()) == 18

    def drawn(seed):
        data = D4MDataModule(squares, train_on="random", seed=seed, ipc=2)
        assert sorted(data.training_set.targets) == [0, 0, 1, 1, 2, 2]
        pixels = [np.asarray(data.training_set[i][0]).tobytes() for i in range(6)]
        train = squares.train()
        assert {(p, t) for p, t in zip(pixels, data.training_set.targets, strict=True)} <= {
            (np.asarray(image).tobytes(), label) for image, label in (train[i] for i in range(18))
        }
        assert len(set(pixels)) == 6
        return pixels

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_only_fitting_distils(squares, monkeypatch):
    monkeypatch.setattr("d4m_plugin.datamodules.d4m.distill", None)
    data = D4MDataModule(squares)
    quiet_trainer().test(ImageClassifier(3, 16), datamodule=data, verbose=False)
    with pytest.raises(TypeError):
        data.train_dataloader()


def test_a_finished_set_can_be_named(squares, tmp_path):
    made = distill(squares, Recipe(**RECIPE), output=tmp_path / "set")
    data = D4MDataModule(squares, set_folder=tmp_path / "set")
    assert torch.equal(data.distilled.images, made.images)
    with pytest.warns(InputWarning, match="not distilled from the training images of squares .* may be in it"):
        D4MDataModule(Squares(per_class=7), set_folder=tmp_path / "set")


class Wide(Squares):
    """Pictures of 32x16 pixels."""

    def test(self):
        images = super().test()
        images.pixels = np.concatenate([images.pixels, 255 - images.pixels], 2)
        return images


def test_real_images_become_square_as_those_of_a_named_set_did(random_pipeline, tmp_path):
    source = Wide()
    source.diffusion = str(random_pipeline)
    for resize in ("crop", "squash"):
        distill(source, Recipe(resize=resize, **RECIPE), output=tmp_path / resize)
        data = D4MDataModule(source, set_folder=tmp_path / resize)
        ((images, _),) = data.val_dataloader()
        assert torch.equal(images[0], to_pixels(source.test()[0][0], 16, resize))


def test_options_that_a_named_set_has_otherwise_are_told(squares, tmp_path):
    distill(squares, Recipe(**RECIPE), output=tmp_path / "set")
    with pytest.warns(InputWarning, match=r"taken as it is: it has ipc 2 \(asked for: 3\); resize 'crop' \(asked"):
        D4MDataModule(squares, set_folder=tmp_path / "set", **RECIPE | {"ipc": 3, "resize": "squash"})
    with warnings.catch_warnings(action="error"):
        D4MDataModule(squares, set_folder=tmp_path / "set", **RECIPE | {"image_size": 8})  # of the training


def test_processes_that_read_are_sent_nothing_of_the_trainer(monkeypatch):
    monkeypatch.setattr("d4m_plugin.loading.HELD_BYTES", 0)
    data = D4MDataModule(Squares(), train_on="real")
    data.trainer = lambda: "no process can be sent this"
    data.trainer.world_size = 1
    for loader in (data.val_dataloader(), data.train_dataloader()):
        assert len(pickle.loads(pickle.dumps(loader.dataset))) == len(loader.dataset)


def test_a_set_of_other_classes_is_refused_at_once(squares, tmp_path):
    distill(squares, Recipe(**RECIPE), output=tmp_path / "set")
    with pytest.raises(InputError, match=r"classes \(red, green / blue, ünï 🦆\) are not those of squares \(a, b\)"):
        D4MDataModule(Squares(classes=("a", "b")), set_folder=tmp_path / "set")
    with pytest.raises(InputError, match="is not a distilled set"):
        D4MDataModule(squares, set_folder=tmp_path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"train_on": "distiled"}, "`train_on` is 'distiled'"),
        ({"distill_batch_size": 0}, "`distill_batch_size` is 0"),
        ({"num_workers": -1}, "`num_workers` is -1"),
        ({"crop_scale": (0.5, 0.1)}, "`crop_scale` is (0.5, 0.1)"),
        ({"crop_scale": (0.0, 1.0)}, "`crop_scale`"),
        ({"ipc": 0}, "`ipc` is 0"),
        ({"weighting": "root", "train_on": "random"}, "`weighting` is 'root', but `train_on` is 'random'"),
        ({"weighting": "count"}, "`weighting` is 'count'; use uniform, share, root"),
        ({"push": True}, "`push` is true; it needs `hub_id`"),
        ({"push": True, "hub_id": "me/mine", "train_on": "real"}, "`push` is true; it needs `hub_id`, and `train_on:"),
        ({"revision": "v1"}, "`revision` is 'v1', but no `hub_id` is named"),
        ({"config_name": "ipc-1"}, "`config_name` is 'ipc-1', but neither `set_folder` nor `hub_id` is named"),
        ({"hub_id": "me/mine", "set_folder": "mine"}, "`hub_id` is 'me/mine' and `set_folder` 'mine'; name one set"),
        ({"batch_keys": ("image", "image")}, "`batch_keys` is ('image', 'image'); it must be two names"),
    ],
)
def test_a_bad_option_is_named_at_construction(options, says):
    with pytest.raises(InputError) as error:
        D4MDataModule(Squares(), **options)
    assert says in str(error.value)


def test_a_set_that_its_repository_lacks_is_said_to_be_made_here(squares, monkeypatch, capsys):
    repository = SimpleNamespace(repo_id="me/squares", configs=["ipc-10"], revision="0")
    monkeypatch.setattr("d4m_plugin.sharing.find_repository", lambda *_: repository)
    data = D4MDataModule(squares, hub_id="me/squares", ipc=2, num_inference_steps=2)
    assert len(data.distilled) == 6
    assert "me/squares has no ipc-2: the set is made here." in capsys.readouterr().err


@pytest.mark.parametrize(("processes", "batches"), [(1, 5), (2, 2)])
def test_no_process_is_left_with_a_batch_of_one_image(processes, batches):
    data = D4MDataModule(Squares(), train_on="real", batch_size=4)  # of 18 images, 9 each of two processes
    data.trainer = SimpleNamespace(world_size=processes)
    loader = data.train_dataloader()
    images = -(-18 // processes)
    assert (images // 4 if loader.drop_last else -(-images // 4)) == batches


def test_labels_of_any_whole_type_are_those_of_torch():
    class Short(Squares):
        def train(self):
            images = super().train()
            images.targets = np.asarray(images.targets, np.int32)
            return images

    data = D4MDataModule(Short(), train_on="real")
    assert next(iter(data.train_dataloader()))[1].dtype == torch.int64


def test_a_source_that_is_none_is_refused():
    with pytest.raises(InputError, match="`source` is 'Digits'; it must be a Source"):
        D4MDataModule("Digits")


def test_a_random_subset_larger_than_a_class_is_refused(squares):
    data = D4MDataModule(squares, train_on="random", ipc=7)
    with pytest.raises(InputError, match="`ipc` is 7, but class 'red' has 6 images"):
        data.train_dataloader()


def test_printing_does_not_distil(squares, monkeypatch):
    monkeypatch.setattr("d4m_plugin.datamodules.d4m.distill", None)
    assert "squares" in str(D4MDataModule(squares))


def test_sigterm_ends_distilling_and_is_lightnings_again_afterwards(squares, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    during = []
    monkeypatch.setattr(
        "d4m_plugin.datamodules.d4m.distill", lambda *_, **__: during.append(signal.getsignal(signal.SIGTERM))
    )
    signal.signal(signal.SIGTERM, lambda *_: None)
    own = signal.getsignal(signal.SIGTERM)
    try:
        _ = D4MDataModule(squares).distilled
        assert during == [signal.SIG_DFL]
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_flip_follows_the_source():
    assert D4MDataModule().flip is False  # digits
    assert D4MDataModule(Squares()).flip is True
    assert D4MDataModule(Squares(), flip=False).flip is False


def test_the_loader_mirrors_nothing_where_it_may_not(tmp_path):
    half = Image.new("RGB", (40, 20))
    half.paste("white", (0, 0, 20, 20))
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / place).mkdir(parents=True)
        half.save(tmp_path / place / "half.png")
    data = D4MDataModule(ImageFolder(tmp_path), train_on="real", crop_scale=(1.0, 1.0), flip=False)
    for _ in range(10):
        ((images, _),) = data.train_dataloader()
        assert (images[..., 0] > images[..., -1]).all()


def test_each_class_is_drawn_as_often_as_any_whatever_its_prototypes(squares):
    data = D4MDataModule(squares, weighting="share", ipc=3, num_inference_steps=2)
    data.distilled.weights[:3] = 1.0  # as of a class of one prototype
    weights = data._sampler(data._held_training_set).weights
    torch.testing.assert_close(weights.view(3, 3).sum(1), torch.ones(3).double())
