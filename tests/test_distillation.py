import dataclasses
import hashlib
import io
import json

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import DatasetCard
from PIL import Image
from safetensors.torch import load_file, save_file

import d4m_plugin.distillation as distillation
from d4m_plugin import DistilledDataset, InputError, Recipe, distill
from d4m_plugin.preview import grid
from tests.toys import Squares

RECIPE = Recipe(ipc=4, prototypes=2, num_inference_steps=4)


def files(folder):
    """Every file with its bytes, but for the timings in d4m.json."""
    contents = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    metadata = json.loads(contents.pop("ipc-4/d4m.json"))
    return contents | {"metadata": {name: value for name, value in metadata.items() if name != "seconds"}}


def test_a_set_holds_ipc_images_of_each_class(squares):
    dataset = distill(squares, RECIPE)
    assert dataset.classes == ["red", "green / blue", "ünï 🦆"]
    assert dataset.targets == [0] * 4 + [1] * 4 + [2] * 4
    assert dataset.images.shape == (12, 3, 16, 16)
    assert dataset.images.flatten(1).float().std(1).min() > 0  # no image is blank


def test_the_folder_reads_alike_through_datasets_and_torchvision(squares):
    ours = distill(squares, RECIPE)
    theirs = datasets.load_dataset(str(ours.root), split="train")
    assert theirs.features["label"].names == ours.classes
    assert theirs["label"] == ours.targets
    for row, (image, _) in zip(theirs, ours, strict=True):
        assert (np.asarray(row["image"]) == np.asarray(image)).all()
    assert theirs["prototype"] == [0, 1, 0, 1] * 3
    assert len(set(theirs["seed"])) == 12


def test_the_same_recipe_gives_the_same_bytes(squares, tmp_path):
    first = distill(squares, RECIPE, output=tmp_path / "first")
    second = distill(squares, RECIPE, output=tmp_path / "second")
    assert files(first.root) == files(second.root)
    other = distill(squares, dataclasses.replace(RECIPE, seed=1), output=tmp_path / "other")
    assert not torch.equal(first.images, other.images)


def test_the_batch_size_changes_a_set_by_rounding_only(squares, tmp_path, monkeypatch, random_model):
    monkeypatch.setattr(distillation, "LatentDiffusion", lambda *_: random_model)  # float32
    whole = distill(squares, RECIPE, output=tmp_path / "whole")
    split = distill(squares, RECIPE, output=tmp_path / "split", batch_size=5)
    assert (whole.images.int() - split.images.int()).abs().max() <= 1


@pytest.mark.parametrize(
    "changes",
    [
        {"strength": 0.3},
        {"guidance_scale": 2.0},
        {"num_inference_steps": 8},
        {"prompt": "a {name}"},
        {"negative_prompt": "red"},
        {"scheduler": "PNDMScheduler"},
        {"prototypes": 4},
        {"resolution": 32},
    ],
    ids=str,
)
def test_each_option_of_the_recipe_acts(squares, tmp_path, changes):
    plain = distill(squares, RECIPE, output=tmp_path / "plain")
    changed = distill(squares, dataclasses.replace(RECIPE, **changes), output=tmp_path / "changed")
    assert not torch.equal(plain.images, changed.images)


def test_images_are_kept_at_the_size_asked_for(squares):
    assert distill(squares, dataclasses.replace(RECIPE, image_size=12)).images.shape == (12, 3, 12, 12)


def test_a_finished_set_is_found_again(squares, monkeypatch):
    first = distill(squares, RECIPE)
    monkeypatch.setattr(distillation, "LatentDiffusion", None)
    assert distill(squares, RECIPE).root == first.root


def test_distilling_leaves_the_random_state_alone(squares):
    state = torch.get_rng_state()
    distill(squares, RECIPE)
    assert torch.equal(state, torch.get_rng_state())


def test_the_card_says_how_to_load_and_what_is_inside(squares):
    card = (distill(squares, RECIPE).root / "README.md").read_text(encoding="utf-8")
    assert 'load_dataset("path/to/this/folder", "ipc-4", split="train")' in card
    data = DatasetCard(card).data.to_dict()
    assert data["size_categories"] == ["n<1K"]
    assert data["license"] == "unknown"
    label = next(feature for feature in data["dataset_info"]["features"] if feature["name"] == "label")
    assert label["dtype"]["class_label"]["names"] == {"0": "red", "1": "green / blue", "2": "ünï 🦆"}


def test_an_error_of_reading_is_not_called_one_of_writing(squares, monkeypatch):
    def broken(self, index):
        raise OSError("broken image")

    monkeypatch.setattr("tests.toys._Squares.__getitem__", broken)
    with pytest.raises(OSError, match="broken image"):
        distill(squares, RECIPE)


def test_a_run_that_died_goes_on_and_gives_the_same_set(squares, tmp_path, monkeypatch):
    whole = distill(squares, RECIPE, output=tmp_path / "whole")
    monkeypatch.setattr(distillation, "BLOCK", 5)
    synthesise = distillation.synthesise
    made = []

    def dies_after_two(wanted, *rest):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(wanted)
        return synthesise(wanted, *rest)

    monkeypatch.setattr(distillation, "synthesise", dies_after_two)
    with pytest.raises(KeyboardInterrupt):
        distill(squares, RECIPE, output=tmp_path / "set")
    assert not (tmp_path / "set").exists()  # nothing that looks whole

    clusterings = []
    monkeypatch.setattr(distillation, "cluster", lambda *arguments: clusterings.append(arguments))
    monkeypatch.setattr(distillation, "synthesise", lambda *rest: made.append(rest[0]) or synthesise(*rest))
    resumed = distill(squares, RECIPE, output=tmp_path / "set")
    assert clusterings == []
    assert [len(block) for block in made] == [5, 5, 2]
    assert resumed.targets == whole.targets
    assert (resumed.images.int() - whole.images.int()).abs().max() <= 2  # other blocks: rounding
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "whole"]


def test_a_crash_while_putting_the_set_together_leaves_no_set(squares, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(distillation, "write_card", full)
        with pytest.raises(InputError, match="No space left on device"):
            distill(squares, RECIPE, output=tmp_path / "set")
    assert not (tmp_path / "set").exists()
    assert len(distill(squares, RECIPE, output=tmp_path / "set")) == 12


def test_the_record_says_what_made_the_set(squares):
    dataset = distill(squares, RECIPE)
    metadata = json.loads((dataset.folder / "d4m.json").read_text(encoding="utf-8"))
    assert metadata["recipe"]["strength"] == 0.7
    assert metadata["recipe"]["image_size"] == 16  # resolved
    assert metadata["source"]["fingerprint"] == squares.fingerprint
    for name, checksum in metadata["checksums"].items():
        assert hashlib.sha256((dataset.folder / name).read_bytes()).hexdigest() == checksum
    files = {path.name for path in dataset.folder.iterdir()}
    assert set(metadata["checksums"]) == files - {"d4m.json"}


def test_the_preview_shows_each_class_in_its_row(squares, monkeypatch):
    monkeypatch.setattr(distillation, "BLOCK", 5)  # a class's images lie in two blocks
    dataset = distill(squares, RECIPE)
    assert Image.open(dataset.preview).tobytes() == grid(dataset.images.split(4), dataset.classes).tobytes()


def test_weights_are_the_clusters_shares(squares):
    dataset = distill(squares, RECIPE)
    saved = load_file(dataset.folder / "prototypes.safetensors")
    assert saved["latents"].shape == (3, 2, 4, 8, 8)
    torch.testing.assert_close(saved["weights"].sum(1), torch.ones(3))
    torch.testing.assert_close(dataset.weights.view(3, 4)[:, :2], saved["weights"])


def test_images_are_stored_without_loss_as_png(squares):
    dataset = distill(squares, RECIPE)
    rows = pq.read_table(dataset.folder / "train-00000-of-00001.parquet")["image"].to_pylist()
    assert Image.open(io.BytesIO(rows[0]["bytes"])).format == "PNG"


def test_every_stage_can_be_called_alone(squares, random_model, tmp_path):
    recipe = RECIPE.resolved(squares)
    (label, latents), *_ = distillation.encode(squares.train(), [1], random_model, resolution=16)
    assert (label, latents.shape) == (1, (6, 4, 8, 8))
    prototypes = distillation.cluster(latents, recipe.prototypes, seed=0)
    save_file({"latents": latents}, tmp_path / "latents.safetensors")
    grid([random_model.decode(load_file(tmp_path / "latents.safetensors")["latents"])], ["green / blue"]).save(
        tmp_path / "latents.png"
    )
    grid([random_model.decode(prototypes.latents)], ["green / blue"]).save(tmp_path / "prototypes.png")
    images = distillation.synthesise([(1, 0), (1, 1)], {1: prototypes}, list(squares.classes), recipe, random_model)
    assert images["image"].shape == (2, 3, 16, 16)


def test_encoding_goes_class_by_class_through_any_batch_size(squares, random_model):
    images = squares.train()
    for batch_size in (1, 4, 100):
        found = dict(distillation.encode(images, [0, 2], random_model, 16, batch_size))
        pixels = torch.stack([torch.tensor(images.pixels[i]).permute(2, 0, 1) for i in range(18) if i % 3 == 2])
        assert list(found) == [0, 2]
        torch.testing.assert_close(found[2], random_model.encode(pixels), atol=1e-5, rtol=1e-5)


def test_workers_read_the_same_images(squares, random_model):
    plain = dict(distillation.encode(squares.train(), [0, 1], random_model, 16))
    workers = dict(distillation.encode(squares.train(), [0, 1], random_model, 16, num_workers=2))
    assert all(torch.equal(plain[label], workers[label]) for label in (0, 1))


def test_a_class_with_too_few_images_is_named(random_pipeline, squares):
    with pytest.raises(InputError, match=r"`prototypes` is 10, but class 'red' has 6 images"):
        distill(squares, Recipe(ipc=10))


def test_two_classes_of_one_name_are_refused_before_any_work(random_pipeline, monkeypatch):
    monkeypatch.setattr(distillation, "LatentDiffusion", None)
    with pytest.raises(InputError, match="squares has two classes named 'red'"):
        distill(Squares(classes=("red", "blue", "red")), dataclasses.replace(RECIPE, diffusion=str(random_pipeline)))


def test_an_empty_folder_can_be_the_output(squares, tmp_path):
    (tmp_path / "set").mkdir()
    assert len(distill(squares, RECIPE, output=tmp_path / "set")) == 12


def test_a_folder_of_another_set_is_not_overwritten(squares, tmp_path):
    distill(squares, RECIPE, output=tmp_path / "set")
    with pytest.raises(InputError, match="another source or recipe"):
        distill(squares, dataclasses.replace(RECIPE, seed=1), output=tmp_path / "set")


def test_a_cache_that_cannot_be_written_is_named_before_any_work(squares, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(distillation, "LatentDiffusion", None)
    with pytest.raises(InputError, match=r"`cache_dir` is .* cannot be written"):
        distill(squares, RECIPE, cache_dir=tmp_path / "file" / "cache")
    with pytest.raises(InputError, match=r"`output` is .* cannot be written"):
        distill(squares, RECIPE, output=tmp_path / "file" / "set")


def test_another_model_in_the_same_folder_is_another_set(squares, tmp_path):
    import shutil

    shutil.copytree(squares.diffusion, tmp_path / "model")
    recipe = dataclasses.replace(RECIPE, diffusion=str(tmp_path / "model")).resolved(squares)
    before = distillation.set_fingerprint(squares, recipe)
    assert before == distillation.set_fingerprint(Squares(), recipe)
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert distillation.set_fingerprint(squares, recipe) != before


class TestDistilledDataset:
    def test_transforms_act(self, squares):
        root = distill(squares, RECIPE).root
        dataset = DistilledDataset(root, transform=lambda image: image.size, target_transform=lambda label: -label)
        assert dataset[11] == ((16, 16), -2)

    @pytest.mark.parametrize("config", [None, "ipc-4"])
    def test_a_set_can_be_named(self, squares, config):
        assert len(DistilledDataset(distill(squares, RECIPE).root, config)) == 12

    def test_a_folder_that_is_no_set_is_named(self, tmp_path):
        with pytest.raises(InputError, match="is not a distilled set"):
            DistilledDataset(tmp_path)

    def test_an_unknown_config_is_named(self, squares):
        with pytest.raises(InputError, match=r"`config` is 'ipc-9', but .* holds ipc-4"):
            DistilledDataset(distill(squares, RECIPE).root, "ipc-9")

    def test_damaged_files_are_named(self, squares):
        dataset = distill(squares, RECIPE)
        (dataset.folder / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
        with pytest.raises(InputError, match=r"parquet' is missing or damaged"):
            DistilledDataset(dataset.root)
        (dataset.folder / "d4m.json").write_text('{"format"')
        with pytest.raises(InputError, match=r"d4m.json' is damaged"):
            DistilledDataset(dataset.root)

    def test_a_set_of_another_format_is_refused(self, squares):
        dataset = distill(squares, RECIPE)
        (dataset.folder / "d4m.json").write_text('{"format": 99}')
        with pytest.raises(InputError, match="is of format 99, not 1"):
            DistilledDataset(dataset.root)
