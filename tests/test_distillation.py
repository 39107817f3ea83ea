import collections
import dataclasses
import hashlib
import io
import json
import logging
import weakref

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import DatasetCard
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import pil_to_tensor

import d4m_plugin.assembling as assembling
import d4m_plugin.diffusion as diffusion
import d4m_plugin.distillation as distillation
import d4m_plugin.distilled as distilled
import d4m_plugin.synthesis as synthesis
from d4m_plugin import D4MDataModule, Digits, DistilledDataset, InputError, LatentDiffusion, Recipe, Teacher, distill
from d4m_plugin.devices import Batches
from d4m_plugin.errors import InputWarning
from d4m_plugin.models.students import create_student
from d4m_plugin.preview import grid
from d4m_plugin.prototypes import Prototypes
from d4m_plugin.seeding import generator_of, seed_of
from d4m_plugin.sources.images import to_pixels
from d4m_plugin.subsets import Chosen, random_subset
from d4m_plugin.synthesis import synthesise
from d4m_plugin.teachers import check_above_chance, load_teacher
from tests import toys
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
    monkeypatch.setattr(synthesis, "LatentDiffusion", lambda *_, **__: random_model)  # float32
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
        {"mode_guidance_scale": 0.5, "mode_guidance_stop": 0.9},
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


def test_more_steps_than_the_schedule_has_are_told(squares):
    with pytest.raises(InputError, match="`num_inference_steps` is 1001; the model's schedule has 1000 steps"):
        distill(squares, dataclasses.replace(RECIPE, num_inference_steps=1001))


def test_as_many_steps_as_the_schedule_has_are_taken(squares):
    assert synthesis.open_model(Recipe(num_inference_steps=1000).resolved(squares))


def test_a_model_that_makes_no_images_is_told_before_any_is_encoded(squares, monkeypatch):
    monkeypatch.setattr(LatentDiffusion, "encode", lambda *_: pytest.fail("encoded"))
    with pytest.raises(InputError, match="and `scheduler` 'IPNDMScheduler', with which StableDiffusion"):
        distill(squares, dataclasses.replace(RECIPE, scheduler="IPNDMScheduler"))


def test_a_batch_has_an_image(squares):
    with pytest.raises(InputError, match="`batch_size` is 0; it must be at least 1"):
        distill(squares, RECIPE, batch_size=0)


def test_other_images_names_or_recipe_make_another_set(squares):
    class Other(Squares):
        fingerprint = "others"

    class Renamed(Squares):
        fingerprint = squares.fingerprint

    of = distillation.set_fingerprint
    sources = [squares, Other(), Renamed(classes=("cyan", "magenta", "yellow"))]
    for each in sources:
        each.diffusion = squares.diffusion
    names = {of(each, RECIPE.resolved(each)) for each in sources}
    assert len(names | {of(squares, dataclasses.replace(RECIPE, seed=1).resolved(squares))}) == 4


def test_a_finished_set_is_found_again(squares, monkeypatch):
    first = distill(squares, RECIPE)
    monkeypatch.setattr(synthesis, "LatentDiffusion", None)
    assert distill(squares, RECIPE).root == first.root


def test_distilling_leaves_the_random_state_alone(squares):
    state = torch.get_rng_state()
    distill(squares, RECIPE)
    assert torch.equal(state, torch.get_rng_state())


def test_the_card_says_how_to_load_and_what_is_inside(squares):
    card = (distill(squares, RECIPE).root / "README.md").read_text(encoding="utf-8")
    assert 'load_dataset("path/to/this/folder", "ipc-4", split="train")' in card
    assert "## ipc-4: 4 images a class\n" in card
    data = DatasetCard(card).data.to_dict()
    assert data["size_categories"] == ["n<1K"]
    assert data["license"] == "unknown"
    label = next(feature for feature in data["dataset_info"]["features"] if feature["name"] == "label")
    assert label["dtype"]["class_label"]["names"] == {"0": "red", "1": "green / blue", "2": "ünï 🦆"}


def test_an_error_of_reading_is_not_called_one_of_writing(squares, monkeypatch):
    def broken(*_):
        raise OSError("broken image")

    monkeypatch.setattr("d4m_plugin.encoding.squares_of", broken)  # since the first pass
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
        patch.setattr(assembling, "write_card", full)
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
    for label in range(3):
        assert saved[f"{label}.latents"].shape == (2, 4, 8, 8)
        torch.testing.assert_close(saved[f"{label}.weights"].sum(), torch.tensor(1.0))
        torch.testing.assert_close(dataset.weights.view(3, 4)[label, :2], saved[f"{label}.weights"])


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


def test_noise_differs_between_images_and_classes_of_one_prototype(random_model, squares):
    prototypes = Prototypes(torch.zeros(1, 4, 8, 8), torch.ones(1))
    wanted = [(0, 0), (0, 1), (1, 0)]
    recipe = RECIPE.resolved(squares)
    images = synthesise(wanted, {0: prototypes, 1: prototypes}, ["red"] * 2, recipe, random_model)["image"]
    assert len(images.flatten(1).unique(dim=0)) == 3


class Redness(torch.nn.Module):
    """Surer of class 0 the redder an image is, of class 1 the less."""

    def forward(self, images):
        redness = images[:, 0].mean((1, 2)) * 100
        return torch.stack([redness, -redness, torch.zeros_like(redness)], 1)


def test_of_more_images_than_are_kept_the_teacher_keeps_the_surest(random_model, squares):
    starts = Prototypes(torch.randn(2, 4, 8, 8, generator=generator_of(0)), torch.tensor([0.5, 0.5]))
    prototypes, wanted = {0: starts, 1: starts}, [(0, 0), (0, 1), (1, 0), (1, 1)]
    recipe = Recipe(ipc=2, num_inference_steps=2, oversample=3).resolved(squares)
    teacher = Teacher(Redness(), squares.classes, 16, [0.5] * 3, [0.5] * 3)
    made = synthesise(wanted, prototypes, list(squares.classes), recipe, random_model, teacher)

    def alone(*key):
        label, index, *_ = key
        latents = random_model.denoise(
            starts.latents[index][None], [squares.classes[label]], [generator_of(0, *key)], num_inference_steps=2
        )
        return random_model.decode(latents, 16)[0]

    numbers = []
    for image, seed, (label, index) in zip(made["image"], made["seed"], wanted, strict=True):
        keys = [(label, index), (label, index, 1), (label, index, 2)]
        candidates = {key: alone(*key) for key in keys}
        best = (max if label == 0 else min)(keys, key=lambda key: candidates[key][0].float().mean())
        assert (image.int() - candidates[best].int()).abs().max() <= 1
        assert seed == seed_of(0, *best)
        numbers.append(keys.index(best))
    assert len(set(numbers)) > 1  # not always the same try

    one_by_one = synthesise(wanted, prototypes, list(squares.classes), recipe, random_model, teacher, Batches(1))
    assert torch.equal(made["seed"], one_by_one["seed"])


class Reds(torch.nn.Module):
    """Logits of two classes from an image's two brightest channels."""

    def forward(self, images):
        return images.amax((2, 3))[:, :2] * 255


def test_the_surest_is_by_probability_and_of_more_than_one_colour():
    def image(first, second):
        pixels = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
        pixels[0, 0, 0, 0], pixels[0, 1, 0, 0] = first, second
        return pixels

    teacher = Teacher(Reds(), ["a", "b"], 4, [0.0] * 3, [1.0] * 3)
    larger, surer, of_one_colour = image(9, 8), image(5, 1), torch.full((1, 3, 4, 4), 0, dtype=torch.uint8)
    of_one_colour[:, 0] = 99
    label = torch.tensor([0])
    assert synthesis.surest(torch.stack([larger, surer]), label, teacher) == 1
    assert synthesis.surest(torch.stack([of_one_colour, larger]), label, teacher) == 1
    assert synthesis.of_one_colour(torch.cat([of_one_colour, larger])) == [0]  # a constant channel is no colour


def test_a_teacher_at_chance_chooses_nothing(squares, tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "make_prototypes", lambda *_: pytest.fail("the work begins"))
    weights = {name: torch.zeros_like(each) for name, each in create_student("convnet", 3, 16).state_dict().items()}
    student = {"student": "convnet", "num_classes": 3, "image_size": 16}
    seen = {"classes": squares.classes, "mean": [0.5] * 3, "std": [0.5] * 3}
    metadata = {"student": json.dumps(student), "data": json.dumps(seen)}
    save_file(weights, tmp_path / "guessing.safetensors", metadata)
    with pytest.raises(InputError, match="it is told from chance"):
        distill(squares, Recipe(ipc=4, oversample=2, teacher=str(tmp_path / "guessing.safetensors")))


def test_oversampling_with_the_sources_own_teacher(random_pipeline, monkeypatch):
    recipe = Recipe(diffusion=str(random_pipeline), ipc=1, num_inference_steps=2, max_images_per_class=3)
    plain = distill(Digits(), recipe)
    chosen = distill(Digits(), dataclasses.replace(recipe, oversample=4))
    assert plain.recipe["teacher"] is None
    assert chosen.recipe["teacher"] == "auto"
    teacher = load_teacher("auto", Digits())

    def sureness(dataset):
        return teacher(dataset.images / 255).log_softmax(1)[range(10), dataset.targets].sum()

    assert sureness(chosen) > sureness(plain)


def test_a_teacher_that_cannot_choose_is_told_before_the_work(squares, tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "make_prototypes", lambda *_: pytest.fail("the work begins"))
    with pytest.raises(InputError, match="`teacher` is 'none', neither auto, "):
        distill(squares, Recipe(ipc=4, oversample=2, teacher="none"))


def test_another_teacher_makes_another_set(squares, tmp_path):
    names = set()
    for content in (b"one", b"two"):
        (tmp_path / "teacher.ckpt").write_bytes(content)
        recipe = Recipe(ipc=4, oversample=2, teacher=str(tmp_path / "teacher.ckpt")).resolved(squares)
        names.add(distillation.set_fingerprint(squares, recipe))
    assert len(names) == 2


def test_encoding_goes_class_by_class_through_any_batch_size(squares, random_model):
    images = squares.train()
    for batch_size in (1, 4, 100):
        found = dict(distillation.encode(images, [0, 2], random_model, 16, batch_size=batch_size))
        pixels = torch.stack([torch.tensor(images.pixels[i]).permute(2, 0, 1) for i in range(18) if i % 3 == 2])
        assert list(found) == [0, 2]
        torch.testing.assert_close(found[2], random_model.encode(pixels), atol=1e-5, rtol=1e-5)


class Wide(Squares):
    """Squares between stripes that a crop leaves out."""

    def train(self):
        class Images(toys._Squares):
            def __getitem__(self, index):
                square, label = super().__getitem__(index)
                wide = Image.new("RGB", (32, 16), "white")
                wide.paste(square, (8, 0))
                return wide, label

        return Images(3, 6, seed=0)


def test_images_that_are_not_square_are_cropped_or_squashed(squares, random_model):
    images, latents = Wide().train(), {}
    for resize in ("crop", "squash"):
        latents[resize] = dict(distillation.encode(images, [0], random_model, 16, resize))[0]
        pixels = torch.stack([to_pixels(images[index][0], 16, resize) for index in range(0, 18, 3)])
        torch.testing.assert_close(latents[resize], random_model.encode(pixels), atol=1e-5, rtol=1e-5)
    assert not torch.equal(*latents.values())
    sets = [distill(Wide(), dataclasses.replace(RECIPE, resize=resize)).images for resize in ("crop", "squash")]
    assert not torch.equal(*sets)


def test_the_model_takes_no_more_images_at_once_than_asked_for(squares, monkeypatch):
    sizes = []
    for name in ("encode", "denoise"):
        own = getattr(LatentDiffusion, name)
        monkeypatch.setattr(
            LatentDiffusion, name, lambda *args, own=own, **kwargs: sizes.append(len(args[1])) or own(*args, **kwargs)
        )
    distill(squares, RECIPE, batch_size=3)
    assert max(sizes) == 3


def test_the_seed_decides_the_noise(squares, random_model):
    prototypes = {0: Prototypes(torch.randn(1, 4, 8, 8, generator=generator_of(0)), torch.ones(1))}
    recipes = [Recipe(ipc=1, num_inference_steps=2, seed=seed).resolved(squares) for seed in (0, 1)]
    one, other = (synthesise([(0, 0)], prototypes, ["a"], recipe, random_model)["image"] for recipe in recipes)
    assert not torch.equal(one, other)


def test_prompts_that_the_embedded_model_never_saw_are_told(squares, recwarn):
    model = LatentDiffusion("digits", device=torch.device("cpu"))
    synthesis.warn_of_prompts(["3", "7"], Recipe(diffusion="digits").resolved(squares), model)
    assert not recwarn
    with pytest.warns(InputWarning, match="trained on 0, 1, .* knows nothing of 1 of 2 prompts, such as 'pizza'"):
        synthesis.warn_of_prompts(["3", "pizza"], Recipe(diffusion="digits").resolved(squares), model)


def test_each_class_is_clustered_by_a_seed_of_its_own(squares, monkeypatch):
    seeds, own = [], distillation.cluster
    monkeypatch.setattr(distillation, "cluster", lambda *args: seeds.append(args[2]) or own(*args))
    distill(squares, dataclasses.replace(RECIPE, seed=5))
    assert seeds == [seed_of(5, label) for label in range(3)]


def test_workers_read_the_same_images(squares, random_model):
    plain = dict(distillation.encode(squares.train(), [0, 1], random_model, 16))
    workers = dict(distillation.encode(squares.train(), [0, 1], random_model, 16, num_workers=2))
    assert all(torch.equal(plain[label], workers[label]) for label in (0, 1))


class Uneven(Squares):
    """Squares of which each class has its own number of images."""

    def __init__(self, *counts: int) -> None:
        super().__init__(max(counts), tuple("abcdefghij"[: len(counts)]))
        self.counts = counts

    @property
    def fingerprint(self) -> str:
        return f"uneven {self.counts}"

    def train(self):
        images = super().train()
        seen = torch.zeros(len(self.counts), dtype=torch.long)
        chosen = []
        for index, label in enumerate(images.targets):
            seen[label] += 1
            chosen += [index] if seen[label] <= self.counts[label] else []
        return Chosen(images, torch.tensor(chosen))


def test_in_a_class_of_few_images_each_becomes_a_prototype(squares, random_model):
    source = Uneven(7, 3, 1)
    with pytest.warns(InputWarning, match=r"2 of 3 classes have fewer .* than `prototypes`, 4, such as 'b'"):
        dataset = distill(source, Recipe(ipc=4, num_inference_steps=2))
    assert dataset.targets == [0] * 4 + [1] * 4 + [2] * 4  # never fewer than ipc
    assert dataset.metadata["fewer_prototypes"] == {"1": 3, "2": 1}
    saved = load_file(dataset.folder / "prototypes.safetensors")
    (_, latents), (_, only) = distillation.encode(source.train(), [1, 2], random_model, 16)
    torch.testing.assert_close(saved["2.latents"].float(), only, atol=1e-2, rtol=1e-2)
    assert saved["1.latents"].float().flatten(1).sum(1).sort().values.tolist() == pytest.approx(
        latents.flatten(1).sum(1).sort().values.tolist(), abs=0.1
    )
    rows = pq.read_table(dataset.folder / "train-00000-of-00001.parquet")
    assert rows["prototype"].to_pylist() == [0, 1, 2, 3, 0, 1, 2, 0, 0, 0, 0, 0]
    assert rows["weight"].to_pylist()[8:] == [1.0] * 4
    assert not torch.equal(dataset.images[8], dataset.images[9])  # further noise


def test_imbalance_of_one_to_a_thousand(squares):
    with pytest.warns(InputWarning, match="1 of 2 classes have fewer"):
        dataset = distill(Uneven(1000, 1), Recipe(ipc=2, num_inference_steps=2))
    assert (dataset.targets, dataset.metadata["fewer_prototypes"]) == ([0, 0, 1, 1], {"1": 1})


def test_a_class_without_images_and_a_single_class_are_named_before_any_work(squares, monkeypatch):
    monkeypatch.setattr(synthesis, "LatentDiffusion", None)
    with pytest.raises(InputError, match=r"class 'b' of uneven \(label 1\) has no training images"):
        distill(Uneven(2, 0, 2), RECIPE)
    with pytest.raises(InputError, match="uneven has the one class 'a'; there is nothing to tell apart"):
        distill(Uneven(2), RECIPE)


def test_class_names_of_any_kind_work_and_decide_no_file_or_key(squares, caplog, monkeypatch):
    libraries = ("diffusers", "transformers")
    for library in libraries:
        monkeypatch.setattr(logging.getLogger(library), "handlers", [caplog.handler])
    names = ("crane", "crane", "a/b, \"c\"\n'd'", "../..", "鶴 🦆", "x" * 200, "")
    with pytest.warns(InputWarning, match=r"1 of 7 prompts are longer than .* reads .*'xxxx.*class_names"):
        dataset = distill(Squares(2, names), Recipe(ipc=2, num_inference_steps=2))
    assert not [record for record in caplog.records if record.name.startswith(libraries)]  # what was warned of
    assert dataset.classes == list(names)
    assert dataset.targets == [label for label in range(7) for _ in range(2)]
    loaded = datasets.load_dataset(str(dataset.root), split="train")
    assert loaded["label"][:] == dataset.targets
    assert loaded.features["label"].names == ["crane", "crane (2)", *names[2:]]  # `datasets` wants them unlike
    assert {path.name for path in dataset.folder.iterdir()} == {
        "d4m.json",
        "preview.png",
        "prototypes.png",
        "prototypes.safetensors",
        "train-00000-of-00001.parquet",
    }


def test_what_the_prompt_says_can_be_overridden(squares, tmp_path, monkeypatch):
    prompts = []
    monkeypatch.setattr(distillation.LatentDiffusion, "cuts", lambda self, prompt: prompts.append(prompt))
    (tmp_path / "names.yaml").write_text("red: crimson\n2: a duck\n", encoding="utf-8")
    recipe = dataclasses.replace(RECIPE, prompt="{name}, photo", class_names=str(tmp_path / "names.yaml"))
    dataset = distill(squares, recipe)
    assert prompts == ["crimson, photo", "green / blue, photo", "a duck, photo"]
    assert dataset.classes == list(squares.classes)  # what the labels are called stays
    assert dataset.recipe["class_names"] == {"red": "crimson", "2": "a duck"}
    with pytest.raises(InputError, match="`class_names` has 'rot', which is no class of squares and no label number"):
        distill(squares, Recipe(class_names={"rot": "red"}))


def test_latents_of_a_class_are_in_memory_once(squares):
    made = []

    class Model:
        def encode(self, pixels):
            assert sum(latents() is not None for latents in made) <= 1
            latents = torch.full((len(pixels), 4, 8, 8), float(len(made)))
            made.append(weakref.ref(latents))
            return latents

    found = dict(distillation.encode(squares.train(), [0, 2], Model(), 16, batch_size=2))
    assert {label: latents[:, 0, 0, 0].tolist() for label, latents in found.items()} == {
        0: [0, 0, 1, 1, 2, 2],
        2: [3, 3, 4, 4, 5, 5],
    }


def test_no_more_images_of_a_class_are_encoded_than_asked_for(squares, monkeypatch):
    read = []
    get = toys._Squares.__getitem__
    monkeypatch.setattr("tests.toys._Squares.__getitem__", lambda self, index: read.append(index) or get(self, index))
    recipe = dataclasses.replace(RECIPE, max_images_per_class=3)
    first, first_read = distill(squares, recipe), set(read)
    assert sorted(collections.Counter(index % 3 for index in first_read).values()) == [3, 3, 3]
    assert len({frozenset(index // 3 for index in first_read if index % 3 == label) for label in range(3)}) > 1
    read.clear()
    assert distill(squares, dataclasses.replace(recipe, seed=1)).images.ne(first.images).any()
    assert set(read) != first_read


def test_kept_latents_are_encoded_once_and_give_the_same_set(squares, monkeypatch, tmp_path):
    without = distill(squares, RECIPE, cache_dir=tmp_path / "without")
    assert not (tmp_path / "without" / "latents").exists()
    kept = distill(squares, RECIPE, cache_dir=tmp_path / "cache", keep_latents=True)
    assert torch.equal(kept.images, without.images)
    others = [dataclasses.replace(RECIPE, **change) for change in ({"ipc": 1, "prototypes": 1}, {"seed": 1})]
    expected = [distill(squares, other, cache_dir=tmp_path / "without").images for other in others]
    with monkeypatch.context() as patch:
        patch.setattr(distillation.LatentDiffusion, "encode", lambda *_: pytest.fail("encoded again"))
        found = [distill(squares, other, cache_dir=tmp_path / "cache").images for other in others]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"resolution": 8},
        {"resize": "squash"},
        {"vae": "vae"},
        {"max_images_per_class": 2},
        {"seed": 1},
    ],
)
def test_kept_latents_are_of_one_model_and_one_way_to_read_the_images(
    squares, random_pipeline, monkeypatch, tmp_path, changes
):
    monkeypatch.chdir(random_pipeline)  # where `vae` is

    recipe = dataclasses.replace(RECIPE, max_images_per_class=3, seed=2)

    def kept(**changes):
        distill(squares, dataclasses.replace(recipe, **changes), cache_dir=tmp_path, keep_latents=True)
        return len(list((tmp_path / "latents").iterdir()))

    assert kept() == kept(strength=0.5) == 1
    if not changes:
        own = diffusion.compute_dtype(torch.device("cpu"))
        monkeypatch.setattr(
            diffusion, "compute_dtype", lambda _: {torch.float32: torch.bfloat16}.get(own, torch.float32)
        )
        changes = {"ipc": 2}
    assert kept(**changes) == 2


def test_latents_lie_nowhere_unless_they_are_kept(squares, monkeypatch, tmp_path):
    seen, cluster = [], distillation.cluster

    def watched(*options):
        seen.append([path.name for path in (tmp_path / "set.partial").rglob("latents-*")])
        return cluster(*options)

    monkeypatch.setattr(distillation, "cluster", watched)
    distill(squares, RECIPE, output=tmp_path / "set")
    assert seen == [[], [], []]


@pytest.mark.parametrize("broken", [0, 2])
def test_an_error_of_clustering_is_not_lost_beside_the_encoding(squares, monkeypatch, broken):
    seeds, cluster = [], distillation.cluster

    def breaks(latents, prototypes, seed):
        seeds.append(seed)
        if len(seeds) == broken + 1:
            raise ArithmeticError("no centre")
        return cluster(latents, prototypes, seed)

    monkeypatch.setattr(distillation, "cluster", breaks)
    with pytest.raises(ArithmeticError, match="no centre"):
        distill(squares, RECIPE)
    assert len(seeds) == broken + 1


def test_an_empty_folder_can_be_the_output(squares, tmp_path):
    (tmp_path / "set").mkdir()
    assert len(distill(squares, RECIPE, output=tmp_path / "set")) == 12


def test_a_folder_of_another_set_is_not_overwritten(squares, tmp_path):
    distill(squares, RECIPE, output=tmp_path / "set")
    with pytest.raises(InputError, match="another source or recipe"):
        distill(squares, dataclasses.replace(RECIPE, seed=1), output=tmp_path / "set")


def test_a_finished_set_is_found_where_nothing_can_be_written(squares, tmp_path, monkeypatch):
    made = distill(squares, RECIPE, output=tmp_path / "set")
    monkeypatch.setattr(distillation, "make_writable", lambda *_: pytest.fail("tried to write"))
    assert distill(squares, RECIPE, output=tmp_path / "set").root == made.root


def test_a_cache_that_cannot_be_written_is_named_before_any_work(squares, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(synthesis, "LatentDiffusion", None)
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
    for litter in (".DS_Store", ".cache/huggingface/download/model_index.json.metadata"):
        (tmp_path / "model" / litter).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / litter).write_text("of Finder, or of a download")
    assert before == distillation.set_fingerprint(squares, recipe)
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

    def test_a_sets_own_folder_names_it(self, squares, monkeypatch):
        made = distill(squares, RECIPE)
        monkeypatch.chdir(made.folder)
        for own in (made.folder, str(made.folder), "."):
            named = DistilledDataset(own)
            assert (named.root, named.folder) == (made.root, made.folder)

    def test_labels_are_found_by_their_names(self, squares):
        dataset = distill(squares, RECIPE)
        assert list(dataset.class_to_idx.items()) == [("red", 0), ("green / blue", 1), ("ünï 🦆", 2)]
        dataset.classes = ["crane", "hen", "crane"]
        assert dataset.class_to_idx == {"crane": 0, "hen": 1}

    def test_a_folder_that_is_no_set_is_named(self, tmp_path):
        with pytest.raises(InputError, match="is not a distilled set"):
            DistilledDataset(tmp_path)

    def test_an_unknown_config_is_named(self, squares):
        with pytest.raises(InputError, match=r"`config_name` is 'ipc-9', but .* holds ipc-4"):
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
        with pytest.raises(InputError, match="is of format 99, not 4"):
            DistilledDataset(dataset.root)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("out of memory"), RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")]
)
def test_where_memory_runs_out_batches_are_halved_and_the_set_is_the_same(squares, tmp_path, monkeypatch, error):
    whole = distill(squares, RECIPE, output=tmp_path / "whole", batch_size=2)
    sizes = []
    for name in ("encode", "denoise"):
        real = getattr(LatentDiffusion, name)

        def small(self, items, *rest, real=real, **options):
            sizes.append(len(items))
            if len(items) > 2:
                raise error
            return real(self, items, *rest, **options)

        monkeypatch.setattr(LatentDiffusion, name, small)
    halved = distill(squares, RECIPE, output=tmp_path / "halved")
    trial, *sizes = sizes
    assert trial == 1
    assert sizes == [6, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 12, 6, 3, 2, 2, 2, 2, 2, 2]
    assert torch.equal(halved.images, whole.images)
    assert halved.targets == whole.targets


def test_an_error_that_is_not_of_memory_stays():
    def work(batch):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        Batches(8).run(work, 3)


def test_memory_for_not_even_one_image_is_told():
    def work(batch):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(InputError, match="does not hold one image"):
        Batches(8).run(work, 3)


@pytest.mark.parametrize("always", [False, True])
def test_an_image_of_one_colour_is_made_again_in_float32(squares, random_model, random_pipeline, monkeypatch, always):
    """As one with numbers that are none comes out of the VAE."""
    recipe = Recipe(ipc=4, num_inference_steps=2, oversample=2).resolved(squares)
    points = torch.randn(2, 4, 8, 8, generator=generator_of(0))
    prototypes = {label: Prototypes(points, torch.tensor([0.5, 0.5])) for label in range(3)}
    wanted = [(0, 0), (1, 1), (1, 0)]
    model = LatentDiffusion(str(random_pipeline), dtype=torch.bfloat16)
    teacher = Teacher(torch.nn.Identity(), squares.classes, 16, [0.5] * 3, [0.5] * 3)  # who keeps each second try
    monkeypatch.setattr(synthesis, "surest", lambda *_: torch.ones(3, dtype=torch.int64))
    expected = synthesise(wanted, prototypes, list(squares.classes), recipe, model, teacher)["image"]
    expected[1] = synthesise(wanted, prototypes, list(squares.classes), recipe, random_model, teacher)["image"][1]
    precise, decode = [], LatentDiffusion.decode

    def blank_at_first(self, latents, size=None):
        images = decode(self, latents, size).clone()
        if len(images) == 3 or always:
            images[min(1, len(images) - 1)] = 0
        else:
            precise.append(self.dtype)
        return images

    monkeypatch.setattr(LatentDiffusion, "decode", blank_at_first)
    if always:
        with pytest.warns(InputWarning, match="1 images are of one colour, in float32 too, of 'green / blue'"):
            synthesise(wanted, prototypes, list(squares.classes), recipe, model, teacher)
        return
    images = synthesise(wanted, prototypes, list(squares.classes), recipe, model, teacher)["image"]
    assert precise == [torch.float32]
    assert (images.int() - expected.int()).abs().max() <= 1


def test_an_image_of_one_colour_that_float32_has_no_room_for_ends_nothing(squares, random_pipeline, monkeypatch):
    recipe = Recipe(ipc=1, num_inference_steps=2).resolved(squares)
    model = LatentDiffusion(str(random_pipeline), dtype=torch.bfloat16)
    monkeypatch.setattr(model.pipeline, "to", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError))
    monkeypatch.setattr(model, "decode", lambda latents, size: torch.zeros(len(latents), 3, size, size).byte())
    prototypes = {0: Prototypes(torch.zeros(1, 4, 8, 8), torch.ones(1))}
    with pytest.warns(InputWarning, match="1 images are of one colour, and the memory does not hold the model"):
        made = synthesise([(0, 0)], prototypes, list(squares.classes), recipe, model)
    assert (len(made["image"]), model.dtype) == (1, torch.bfloat16)


@pytest.mark.parametrize("targets", [[0, 1, 3], [0, -1, 1], [[0], [1], [2]], ["red", "red", "red"], [0.0, 1.0, 2.0]])
def test_labels_of_an_own_source_that_are_none_are_told_before_any_work(squares, targets, monkeypatch):
    images = squares.train().__class__(3, 1, seed=0)
    images.targets = targets
    monkeypatch.setattr(Squares, "train", lambda self: images)
    with pytest.raises(InputError, match=r"the `targets` of squares must be a whole number .* below 3"):
        distill(squares, Recipe(ipc=1, num_inference_steps=2))
    with pytest.raises(InputError, match=r"the `targets` of squares must be a whole number .* below 3"):
        D4MDataModule(squares, train_on="real").train_dataloader()


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32])
def test_labels_may_be_of_any_whole_type(squares, kind, monkeypatch):
    class Named(torch.nn.Module):
        def forward(self, images):
            return images.mean((2, 3))  # red, green and blue are the classes

    def short(split):
        images = split(squares)
        images.targets = np.asarray(images.targets, kind)
        return images

    train, test = Squares.train, Squares.test
    monkeypatch.setattr(Squares, "train", lambda self: short(train))
    monkeypatch.setattr(Squares, "test", lambda self: short(test))
    assert distill(squares, Recipe(ipc=1, num_inference_steps=2)).targets == [0, 1, 2]
    assert random_subset(squares, 1, seed=0).targets.tolist() == [0, 1, 2]
    teacher = Teacher(Named(), squares.classes, 16, [0.5] * 3, [0.5] * 3)
    assert check_above_chance(teacher, squares).startswith("names 100% of 12")


def test_an_image_is_decoded_alone_until_all_are(squares, monkeypatch):
    whole = distill(squares, Recipe(ipc=2, num_inference_steps=2))
    made, read, rows = DistilledDataset(whole.root, transform=pil_to_tensor), distilled.read_image, []

    def noting(file, name):
        rows.append(name)
        return read(file, name)

    monkeypatch.setattr(distilled, "read_image", noting)
    assert torch.equal(made[-1][0], whole.images[5])
    assert rows[:1] == ["row 5"]
    assert len(rows) == 1 + 6  # of the other set, all
    monkeypatch.setattr(DistilledDataset, "_read", None)
    by_workers = torch.cat([images for images, _ in DataLoader(made, 2, num_workers=2)])
    assert torch.equal(by_workers, whole.images)
    monkeypatch.setattr(distilled, "read_image", None)
    assert torch.equal(pil_to_tensor(whole[3][0]), whole.images[3])


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_a_training_at_another_size_holds_those_squares_alone(squares, resize):
    distilled = distill(squares, Recipe(ipc=2, num_inference_steps=2))
    expected = torch.stack([to_pixels(image, 24, resize) for image, _ in distilled])
    dataset = DistilledDataset(distilled.root)
    assert torch.equal(dataset.squares(24, resize), expected)
    assert not {"images", "_encoded"} & set(vars(dataset))
    assert torch.equal(dataset.squares(dataset.recipe["image_size"]), distilled.images)


def test_prototypes_are_drawn_at_the_size_of_the_images(squares):
    made = distill(squares, Recipe(ipc=2, num_inference_steps=2, image_size=40))
    with Image.open(made.folder / "prototypes.png") as prototypes, Image.open(made.preview) as images:
        assert prototypes.size == images.size


class OfArrays(Squares):
    def __init__(self, pixels, folders, anything):
        super().__init__()


def test_a_source_may_be_told_what_json_cannot_hold(random_pipeline, monkeypatch, tmp_path):
    monkeypatch.setattr(OfArrays, "diffusion", str(random_pipeline))
    source = OfArrays(np.zeros((2, 2)), [tmp_path / "photos"], object())
    made = distill(source, Recipe(ipc=1, num_inference_steps=2))
    assert made.metadata["source"]["arguments"] == {
        "pixels": "<ndarray>",
        "folders": ["photos"],
        "anything": "<object>",
    }


def test_kept_latents_are_of_one_revision(squares, random_model, monkeypatch, tmp_path):
    monkeypatch.setattr(synthesis, "LatentDiffusion", lambda *_, **__: random_model)
    for revision in ("v1", "v2"):
        recipe = Recipe(ipc=1, num_inference_steps=2, diffusion="me/model", diffusion_revision=revision)
        distill(squares, recipe, cache_dir=tmp_path, keep_latents=True)
    assert len(list((tmp_path / "latents").iterdir())) == 2
