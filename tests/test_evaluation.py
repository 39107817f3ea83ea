"""Is a distilled set better than random real images? The arms, their trainings, and the words of the answer."""

import csv
import dataclasses
import json
import math
import os
import shutil
import struct
import zlib
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import stats

from d4m_plugin import D4MDataModule, Digits, DistilledDataset, InputError, Recipe, distill
from d4m_plugin.card import accuracy
from d4m_plugin.diffusion import LatentDiffusion
from d4m_plugin.errors import InputWarning
from d4m_plugin.evaluation import figures, runs
from d4m_plugin.evaluation.arms import Arms, herded
from d4m_plugin.evaluation.compare import compare
from d4m_plugin.evaluation.evaluate import evaluate, results_of
from d4m_plugin.evaluation.report import write_report
from d4m_plugin.evaluation.runs import Protocol, Trainings, steps_of, trained
from d4m_plugin.evaluation.sets import open_set, ours
from d4m_plugin.evaluation.sweep import _draw, setting_row, sweep
from d4m_plugin.evaluation.verdict import dd_ranking, interval, sentences, table_of
from d4m_plugin.models.classifier import ImageClassifier
from d4m_plugin.relabelling import relabel
from d4m_plugin.seeding import generator_of
from d4m_plugin.sources.images import to_pixels
from d4m_plugin.subsets import Chosen, random_subset
from d4m_plugin.synthesis import synthesise
from tests.toys import Squares

CHEAP = {"num_inference_steps": 2, "strength": 1.0}


@pytest.fixture(autouse=True)
def quick_teacher(monkeypatch):
    """Squares are told apart after few steps."""
    monkeypatch.setattr("d4m_plugin.teaching.LEAST_STEPS", 100)


@pytest.fixture
def arms(distilled_once, squares, tmp_path):
    dataset = distilled_once(Recipe(ipc=4, prototypes=2, **CHEAP), tmp_path / "set")
    return Arms(ours(dataset, squares), squares, squares.diffusion)


def pixels_of(images):
    return torch.stack([to_pixels(images[index][0], 16) for index in range(len(images))])


def protocol(**changes):
    options = {"arms": (), "labels": ("hard",), "students": ("convnet",), "seeds": 2, "steps": 2, "batch_size": 4}
    return Protocol(**(options | {"learning_rates": (1e-3,), "teacher": "auto"} | changes))


@pytest.mark.parametrize("arm", ["distilled", "random", "nearest", "decoded", "generated", "reconstructed"])
def test_every_arm_has_as_many_images_of_each_class(arms, arm):
    images = arms.images(arm, 0)
    assert torch.as_tensor(images.targets).bincount().tolist() == [4, 4, 4]
    assert [images[index][1] for index in range(12)] == list(images.targets)
    assert images[0][0].size == (16, 16)


def test_all_real_images_are_an_arm(arms, squares):
    assert len(arms.images("real", 0)) == len(squares.train())


class Weighed(Squares):
    """Each image takes its number of bytes, and more."""

    def stored_bytes(self):
        return [100 + 30 * number for number in range(len(self.train()))]


@pytest.fixture
def weighed(arms, monkeypatch):
    """Arms within 1,000 bytes of 18 images of 355 bytes on average."""
    monkeypatch.setattr(Arms, "bytes", 1000)
    return Arms(arms.judged, Weighed(6), left_out=torch.tensor([0, 17]))


def test_as_many_random_images_fit_as_the_bytes_of_the_set_hold(weighed):
    drawn = [weighed._within_bytes(seed) for seed in range(20)]
    kept = np.array(weighed.source.stored_bytes())[1:17]  # two are left out
    for chosen in drawn:
        taken, counts = kept[chosen.indices].sum(), np.bincount(chosen.targets, minlength=3)
        others = np.setdiff1d(np.arange(16), chosen.indices)
        assert taken <= 1000 < taken + kept[others].max()
        assert counts.max() - counts.min() <= 1
    assert len({tuple(chosen.indices) for chosen in drawn}) > 10
    assert np.array_equal(drawn[3].indices, weighed._within_bytes(3).indices)
    assert {int(chosen.targets[-1]) for chosen in drawn} == {0, 1, 2}  # no class is always the last served
    images = [len(chosen) for chosen in drawn]
    assert weighed.amount("equal_bytes", 20)["images"] == round(sum(images) / 20)
    assert len(weighed.images("equal_bytes", 0)) == images[0]


def test_where_all_real_images_fit_they_are_all_taken_and_one_too_large_is_none(weighed, monkeypatch):
    monkeypatch.setattr(Arms, "bytes", 10**6)
    assert len(weighed.images("equal_bytes", 0)) == 16
    huge = [10**7, *[100] * 17]
    monkeypatch.setattr(Weighed, "stored_bytes", lambda self: huge)
    assert len(Arms(weighed.judged, Weighed(6)).images("equal_bytes", 0)) == 17


def test_the_bytes_of_a_set_are_those_of_its_files(arms, squares, tmp_path):
    (file,) = (tmp_path / "set").glob("ipc-4/*.parquet")
    assert arms.bytes == file.stat().st_size
    torch.save((torch.zeros(3, 3, 16, 16), torch.arange(3)), tmp_path / "set.pt")
    Image.new("RGB", (16, 16)).save(tmp_path / "black.png")
    others = Arms(open_set(str(tmp_path / "set.pt"), squares), squares)
    assert others.bytes == 3 * (tmp_path / "black.png").stat().st_size


def test_the_bytes_of_anothers_set_are_those_of_its_files(squares, folder_of_images):
    folder, *_ = folder_of_images
    with pytest.warns(InputWarning, match="numbers without names"):
        judged = open_set(str(folder), squares)
    assert Arms(judged, squares).bytes == sum(file.stat().st_size for file in folder.glob("*/*.png"))


def test_equal_bytes_that_cannot_be_had_are_said_before_any_training(arms, monkeypatch):
    with pytest.raises(InputError, match="squares does not tell how many bytes its images take; leave it out, or give"):
        arms.check(("equal_bytes",))
    monkeypatch.setattr(Arms, "bytes", 99)
    with pytest.raises(InputError, match=r"the 99 bytes of the distilled set hold not one of .*, the smallest .* 100;"):
        Arms(arms.judged, Weighed(6)).check(("equal_bytes",))


def test_the_nearest_arm_takes_each_prototypes_nearest_images_once(arms, squares):
    train, model = squares.train(), arms.model
    latents = model.encode(pixels_of(train)).flatten(1)
    found = pixels_of(arms.images("nearest", 0)).view(3, 4, -1)
    for label in range(3):
        members = [index for index, target in enumerate(train.targets) if target == label]
        centres = arms.prototypes[label].latents.flatten(1)
        order = torch.cdist(centres, latents[members]).argsort(1)
        nearest = pixels_of(train)[members][order[:, 0]].flatten(1)
        assert torch.equal(found[label, :2], nearest)
        assert len(found[label].unique(dim=0)) == 4


class OfBrightness(torch.nn.Module):
    """A classifier of squares by their mean colour, whose features are the channels' means."""

    def __init__(self):
        super().__init__()
        self.last = torch.nn.Linear(3, 3)

    def forward(self, images):
        return self.last(images.mean((2, 3)))


@pytest.fixture
def judging(arms, squares):
    """Arms of another method's set, whose teacher is a small network of known features."""
    judged = dataclasses.replace(arms.judged, dataset=None)
    own = Arms(judged, squares)
    own.network = OfBrightness()
    return own


def features_by_class(arms):
    pixels, targets = pixels_of(arms.train), torch.as_tensor(arms.train.targets)
    features = pixels.float().mean((2, 3)) / 255
    return [(pixels[targets == label], features[targets == label]) for label in range(3)]


def test_confident_images_are_those_that_the_teacher_is_surest_of(judging):
    found = pixels_of(judging.images("confident", 0)).view(3, 4, 3, 16, 16)
    for label, (pixels, features) in enumerate(features_by_class(judging)):
        surest = judging.network.last(features).softmax(1)[:, label].argsort(descending=True)[:4]
        assert torch.equal(found[label], pixels[surest])


def test_herding_takes_what_brings_the_mean_nearest_to_that_of_the_class(judging):
    found = pixels_of(judging.images("herding", 0)).view(3, 4, 3, 16, 16)
    for label, (pixels, features) in enumerate(features_by_class(judging)):
        points, taken = torch.nn.functional.normalize(features.double()), []
        for _ in range(4):
            left = [n for n in range(len(points)) if n not in taken]
            taken.append(min(left, key=lambda n: float((points.mean(0) - points[[*taken, n]].mean(0)).norm())))
        assert torch.equal(found[label], pixels[taken])


def test_herded_features_have_the_mean_of_all_sooner_than_random_ones():
    features = torch.randn(200, 8, generator=generator_of(0)) + 1
    points = torch.nn.functional.normalize(features)
    chosen = herded(features, 10)
    distance = (points[chosen].mean(0) - points.mean(0)).norm()
    of_random = [
        (points[torch.randperm(200, generator=generator_of(seed))[:10]].mean(0) - points.mean(0)).norm()
        for seed in range(20)
    ]
    assert distance < min(of_random)
    assert sorted(herded(features, 200).tolist()) == list(range(200))


def test_what_a_teacher_chooses_depends_on_the_teacher_and_not_on_the_set(judging):
    others = Arms(judging.judged, judging.source, teacher="digits")
    assert others.decided_by("herding") != judging.decided_by("herding") == judging.decided_by("confident")
    other_set = Arms(dataclasses.replace(judging.judged, fingerprint="another"), judging.source)
    assert other_set.decided_by("herding") == judging.decided_by("herding")
    with pytest.raises(InputError, match="does not know 3 of 3 classes of squares"):
        others.check(("herding",))


def test_decoded_prototypes_come_again_where_there_are_fewer_than_images(arms):
    images = pixels_of(arms.images("decoded", 0)).view(3, 4, 3, 16, 16)
    for label in range(3):
        assert torch.equal(images[label, :2], arms.model.decode(arms.prototypes[label].latents))
        assert torch.equal(images[label, 2:], images[label, :2])


def test_generated_images_know_nothing_of_the_prototypes(arms, squares, tmp_path):
    before, decoded = (pixels_of(arms.images(arm, 0)) for arm in ("generated", "decoded"))
    file = tmp_path / "set" / "ipc-4" / "prototypes.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    again = Arms(ours(DistilledDataset(tmp_path / "set"), squares), squares, squares.diffusion)
    assert torch.equal(pixels_of(again.images("generated", 0)), before)
    assert not torch.equal(pixels_of(again.images("decoded", 0)), decoded)
    assert len(before.flatten(1).unique(dim=0)) == 12


def test_generated_images_are_pulled_toward_nothing(squares, tmp_path):
    generated = []
    for scale in (0.0, 0.5):
        recipe = Recipe(ipc=2, **CHEAP | {"strength": 1.0, "mode_guidance_scale": scale})
        dataset = distill(squares, recipe, output=tmp_path / f"{scale}")
        generated.append(pixels_of(Arms(ours(dataset, squares), squares, squares.diffusion).images("generated", 0)))
    assert torch.equal(*generated)


def test_reconstructed_images_are_the_random_ones_through_the_vae(arms, squares):
    chosen = pixels_of(random_subset(squares, 4, seed=3))
    model = LatentDiffusion(squares.diffusion)
    difference = pixels_of(arms.images("reconstructed", 3)).int() - model.decode(model.encode(chosen)).int()
    assert difference.abs().max() <= 1  # of half precision in other batches
    assert not torch.equal(pixels_of(arms.images("random", 0)), pixels_of(arms.images("random", 1)))


MADE = ("nearest", "decoded", "generated", "reconstructed")


def keeping(arms, folder):
    return Arms(arms.judged, arms.source, arms.diffusion, kept=folder)


def test_what_a_model_makes_is_kept_for_the_next_command(arms, tmp_path, monkeypatch):
    first = [pixels_of(keeping(arms, tmp_path / "kept").images(arm, 3)) for arm in MADE]
    other_draw = pixels_of(keeping(arms, tmp_path / "kept").images("reconstructed", 4))
    monkeypatch.setattr("d4m_plugin.evaluation.arms.open_model", lambda _: pytest.fail("a model was opened"))
    again = [keeping(arms, tmp_path / "kept").images(arm, 3) for arm in MADE]
    assert all(torch.equal(pixels_of(new), old) for new, old in zip(again, first, strict=True))
    assert all(torch.as_tensor(new.targets).bincount().tolist() == [4, 4, 4] for new in again)
    assert not torch.equal(first[-1], other_draw)
    assert torch.equal(pixels_of(keeping(arms, tmp_path / "kept").images("reconstructed", 4)), other_draw)


@pytest.mark.parametrize(("arm", "files"), [("nearest", 2), ("decoded", 1), ("generated", 1)])
def test_images_that_were_kept_of_other_real_images_are_not_taken_where_they_have_a_part(arms, tmp_path, arm, files):
    keeping(arms, tmp_path / "kept").images(arm, 0)
    without = Arms(arms.judged, arms.source, arms.diffusion, torch.arange(3), tmp_path / "kept")
    without.images(arm, 0)
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) == files


def test_kept_images_are_made_again_where_what_they_depend_on_changes_and_not_else(arms, judging, tmp_path):
    kept, network = tmp_path / "kept", judging.network

    def images(arm, judged, teacher):
        each = Arms(judged, arms.source, arms.diffusion, kept=kept, teacher=teacher)
        each.network = network
        each.images(arm, 0)
        return len(list(kept.glob("*.safetensors")))

    other_set = dataclasses.replace(arms.judged, fingerprint="another")
    assert [images("decoded", arms.judged, "auto"), images("decoded", arms.judged, "x.ckpt")] == [1, 1]
    assert images("decoded", other_set, "auto") == 2
    assert [images("herding", arms.judged, "auto"), images("herding", other_set, "auto")] == [3, 3]
    assert images("herding", arms.judged, "x.ckpt") == 4


@pytest.mark.parametrize("damage", [b"", b"no tensors", None])
def test_a_damaged_file_of_kept_images_is_made_again(arms, tmp_path, damage):
    first = pixels_of(keeping(arms, tmp_path / "kept").images("decoded", 0))
    (file,) = (tmp_path / "kept").glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-9] if damage is None else damage)
    with pytest.warns(InputWarning, match=r"is damaged .* It is made again"):
        assert torch.equal(pixels_of(keeping(arms, tmp_path / "kept").images("decoded", 0)), first)
    assert file.read_bytes() == whole


def test_generating_goes_on_where_it_was_killed(arms, tmp_path, monkeypatch):
    monkeypatch.setattr("d4m_plugin.evaluation.arms.BLOCK", 5)
    whole, blocks = pixels_of(arms.images("generated", 0)), []

    def killed(block, *others):
        if len(blocks) == 2:
            raise KeyboardInterrupt
        blocks.append(block)
        return synthesise(block, *others)

    monkeypatch.setattr("d4m_plugin.evaluation.arms.synthesise", killed)
    with pytest.raises(KeyboardInterrupt):
        keeping(arms, tmp_path / "kept").images("generated", 0)
    blocks.clear()
    assert torch.equal(pixels_of(keeping(arms, tmp_path / "kept").images("generated", 0)), whole)
    assert [len(block) for block in blocks] == [2]


def test_a_set_of_other_classes_is_refused(arms):
    with pytest.raises(InputError, match="whose classes are not those of the distilled set"):
        ours(arms.judged.dataset, Squares(classes=("a", "b", "c")))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"arms": ("medoids",)}, "`arms` has 'medoids'; use distilled, random"),
        ({"labels": ("soft",)}, "`labels` has 'soft'; use teacher, hard"),
        ({"students": ()}, "`students` is empty"),
        ({"seeds": 0}, "`seeds` is 0"),
        ({"learning_rates": (0.1, -1.0)}, "`learning_rates` has -1.0"),
        ({"lr_smoothing": 0.5}, "`lr_smoothing` is 0.5"),
    ],
)
def test_what_cannot_be_evaluated_is_said(changes, says):
    with pytest.raises(InputError, match=says):
        protocol(**changes)


@pytest.mark.parametrize(
    ("budget", "steps"), [("quick", 500), ("paper", 500 * 2), (7, 7), ("7", 7), ("fast", None), (0, None)]
)
def test_a_budget_is_a_word_or_a_number_of_steps(budget, steps):
    with pytest.raises(InputError, match="`batch_size` is 0"):
        steps_of(budget, images=101, batch_size=0)
    if steps is None:
        with pytest.raises(InputError, match=f"`budget` is {budget!r}; use quick, paper, or a number of steps"):
            steps_of(budget, images=101, batch_size=100)
    else:
        assert steps_of(budget, images=101, batch_size=100) == steps


@pytest.mark.parametrize("name", ["nowhere", "./nowhere"])
def test_what_is_nowhere_is_no_set(squares, name):
    with pytest.raises(InputError, match=f"`distilled_set` is '{name}': no folder or file here"):
        open_set(name, squares)


def test_a_set_that_is_no_folder_and_not_on_the_hub_is_both(squares):
    with pytest.raises(InputError, match="`distilled_set` is 'sets/nowhere', no folder here; as a name of the Hub's: "):
        open_set("sets/nowhere", squares)


def results(arms, protocol, folder):
    return trained(Trainings(arms, protocol, folder).of_seeds())


def test_distilled_and_random_are_always_compared():
    assert protocol(arms=("real",)).arms == ("distilled", "random", "real")


def test_a_training_is_made_once_and_the_next_command_goes_on(arms, tmp_path, monkeypatch):
    first = results(arms, protocol(), tmp_path / "runs")
    assert [(run["arm"], run["seed"]) for run in first] == [
        ("distilled", 0),
        ("random", 0),
        ("distilled", 1),
        ("random", 1),
    ]
    (tmp_path / "runs" / Trainings(arms, protocol(), tmp_path / "runs").of_seeds()[3].file).unlink()  # as after a kill
    made = []
    train = Trainings._train
    monkeypatch.setattr(Trainings, "_train", lambda self, run, bar: made.append(run) or train(self, run, bar))
    again = results(arms, protocol(), tmp_path / "runs")
    assert [(run.arm, run.seed) for run in made] == [("random", 1)]
    for run in [*first, *again]:
        del run["seconds"]
    assert again == first
    results(arms, protocol(steps=3), tmp_path / "runs")
    assert len(made) == 5  # another protocol, other trainings


def test_a_run_holds_what_its_accuracy_is_made_of(arms, squares, tmp_path):
    run = results(arms, protocol(seeds=1, steps=4), tmp_path / "runs")[0]
    confusion = torch.tensor(run["confusion"])
    assert confusion.sum(1).tolist() == [4, 4, 4]  # the test images of each class
    assert run["accuracy"] == pytest.approx(confusion.diag().sum().item() / 12, abs=1e-6)
    assert run["accuracies"] == (confusion.diag() / 4).tolist()
    assert [step for step, _ in run["losses"]] == [1, 2, 3, 4]


def test_batches_of_every_arm_are_alike_where_the_set_is_smaller_than_one(arms, tmp_path, monkeypatch):
    seen = []
    step = ImageClassifier.training_step
    monkeypatch.setattr(
        ImageClassifier, "training_step", lambda self, batch, at: seen.append(len(batch[1])) or step(self, batch, at)
    )
    trainings = Trainings(arms, protocol(arms=("real",), seeds=1, batch_size=100), tmp_path / "runs")
    trained(trainings.of_seeds())
    assert trainings.protocol.batch_size == 12 < len(arms.source.train())
    assert seen == [12, 12, 12, 12, 12, 6]  # two steps of distilled, random and of the 18 real images


def test_other_test_images_are_other_trainings(arms, tmp_path, monkeypatch):
    def files():
        trainings = Trainings(arms, protocol(), tmp_path / "runs")
        return {training.file for training in trainings.of_seeds()}

    tests, first = arms.source.test(), files()
    assert files() == first
    for order in (torch.arange(1, 12), torch.arange(11, -1, -1)):  # one less; as many, but others at each place
        monkeypatch.setattr(arms.source, "test", lambda order=order: Chosen(tests, order))
        assert files().isdisjoint(first)
    monkeypatch.setattr(arms.source, "test", lambda: Relabelled(tests))
    assert files().isdisjoint(first)


class Relabelled:
    """Images whose labels are not what they were."""

    def __init__(self, images):
        self.images, self.targets = images, np.asarray(images.targets)[::-1]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index][0], int(self.targets[index])


def test_each_arm_gets_the_learning_rate_that_is_best_on_training_images_it_does_not_see(
    squares, tmp_path, monkeypatch
):
    dataset = distill(squares, Recipe(ipc=2, **CHEAP), output=tmp_path / "set")
    arms = Arms(ours(dataset, squares), squares, squares.diffusion)
    train = D4MDataModule.train_dataloader
    slices, seen = [], []

    def spy(trainer, student, datamodule):
        images, labels = datamodule.held_test_set.tensors
        slices.append({bytes(image) for image in images.flatten(1).numpy()})
        return [labels if student.lr == 2e-3 else (labels + 1) % 3]

    def look(self):
        seen.append({bytes(image) for image in pixels_of(self.training_set).flatten(1).numpy()})
        return train(self)

    monkeypatch.setattr(L.Trainer, "predict", spy)
    monkeypatch.setattr(D4MDataModule, "train_dataloader", look)
    rates = (1e-3, 2e-3, 3e-3)
    options = {"learning_rates": rates, "arms": ("nearest", "real"), "seeds": 1}
    runs = results(arms, protocol(**options), tmp_path / "runs")
    assert {run["lr"] for run in runs} == {2e-3}
    assert len(slices) == 12 + 4  # three rates for each of four arms; then the test images
    assert slices[0] <= {bytes(image) for image in pixels_of(squares.train()).flatten(1).numpy()}
    assert not any(slices[0] & training for training in seen[:12])
    assert len(seen[-1]) == len(squares.train())  # of the run that is tested, all


@pytest.mark.parametrize(("per_class", "slice_of_class"), [(30, 6), (15, 1)])
def test_the_slice_leaves_each_class_as_many_images_as_are_distilled(tmp_path, per_class, slice_of_class):
    torch.save((torch.rand(42, 3, 16, 16), torch.arange(42) % 3), tmp_path / "set.pt")
    source = Squares(per_class)
    arms = Arms(open_set(str(tmp_path / "set.pt"), source), source)
    trainings = Trainings(arms, protocol(learning_rates=(1e-3, 2e-3)), tmp_path / "runs")
    assert torch.as_tensor(trainings._slice.targets).bincount().tolist() == [slice_of_class] * 3
    assert len(trainings._arms_beside_the_slice.images("random", 0)) == 42


def test_rates_cannot_be_chosen_by_images_that_an_arm_needs(tmp_path):
    torch.save((torch.rand(42, 3, 16, 16), torch.arange(42) % 3), tmp_path / "set.pt")
    arms = Arms(open_set(str(tmp_path / "set.pt"), Squares(14)), Squares(14))
    with pytest.raises(InputError, match="`learning_rates` has 2, but a class has as many distilled images as real"):
        Trainings(arms, protocol(learning_rates=(1e-3, 2e-3)), tmp_path / "runs")


def test_all_arms_of_a_seed_start_from_the_same_weights_and_randomness(arms, tmp_path, monkeypatch):
    starts = {}
    fit = L.Trainer.fit

    def spy(trainer, student, datamodule):
        weights = torch.cat([part.detach().flatten() for part in student.parameters()])
        starts.setdefault(float(weights.double().sum()), set()).add(bytes(torch.get_rng_state().numpy()))
        return fit(trainer, student, datamodule=datamodule)

    monkeypatch.setattr(L.Trainer, "fit", spy)
    all_arms = ("herding", "confident", "nearest", "decoded", "generated", "reconstructed", "real")
    results(arms, protocol(arms=all_arms), tmp_path / "runs")
    assert [len(states) for states in starts.values()] == [1, 1]  # one for each of two seeds


def test_the_confusion_is_right_whatever_type_the_labels_have(tmp_path):
    names = tuple(map(str, range(20)))

    class Small(Squares):
        def test(self):
            images = super().test()
            images.targets = np.asarray(images.targets, np.uint8)
            return images

    source = Small(classes=names)
    torch.save((torch.rand(20, 3, 16, 16), torch.arange(20)), tmp_path / "set.pt")
    arms = Arms(open_set(str(tmp_path / "set.pt"), source), source)
    for row in results(arms, protocol(seeds=1), tmp_path / "runs"):
        assert [sum(named) for named in row["confusion"]] == [4] * 20


def test_an_arm_whose_model_cannot_be_opened_is_told_before_any_training(arms, monkeypatch):
    def fail(recipe):
        raise InputError("`vae` is 'gone'")

    monkeypatch.setattr("d4m_plugin.evaluation.arms.open_model", fail)
    arms.check(("distilled", "random"))
    with pytest.raises(InputError, match="`vae` is 'gone'"):
        arms.check(("decoded",))


def test_the_schedule_is_smoothed_for_every_arm_and_is_a_training_of_its_own(arms, tmp_path, monkeypatch):
    ends = []
    fit = L.Trainer.fit

    def spy(trainer, student, datamodule):
        fit(trainer, student, datamodule=datamodule)
        ends.append(student.lr_schedulers().get_last_lr()[0])

    monkeypatch.setattr(L.Trainer, "fit", spy)
    for smoothing, end in ((1.0, 0.0), (2.0, 5e-4)):
        results(arms, protocol(lr_smoothing=smoothing), tmp_path / "runs")
        assert ends == pytest.approx([end] * 4)  # two arms, two seeds
        ends.clear()


def test_one_of_several_sets_is_named_by_its_folder(squares, tmp_path):
    for ipc in (1, 2):
        made = distill(squares, Recipe(ipc=ipc, **CHEAP))
        shutil.copytree(made.folder, tmp_path / "sets" / made.folder.name)
    with pytest.raises(InputError, match="holds several sets; name one as `config_name`: ipc-1, ipc-2"):
        open_set(str(tmp_path / "sets"), squares)
    assert [open_set(str(tmp_path / "sets" / f"ipc-{ipc}"), squares).ipc for ipc in (1, 2)] == [1, 2]


def test_as_many_real_images_of_each_class_are_drawn_as_an_uneven_set_has(squares, tmp_path):
    torch.save((torch.rand(6, 3, 16, 16), torch.tensor([0, 0, 0, 1, 1, 2])), tmp_path / "set.pt")
    arms = Arms(open_set(str(tmp_path / "set.pt"), squares), squares)
    assert torch.as_tensor(arms.images("random", 0).targets).bincount().tolist() == [3, 2, 1]


@pytest.mark.parametrize(
    ("per_class", "arm", "says"),
    [
        (3, "random", "class 'red' has 3 real training images and 4 distilled ones"),
        (6, "generated", "`diffusion` is 'digits', which is not the model that made the set"),
    ],
)
def test_what_cannot_be_compared_is_said_before_any_training(arms, tmp_path, per_class, arm, says):
    unlike = Arms(arms.judged, Squares(per_class), "digits")
    with pytest.raises(InputError, match=says):
        Trainings(unlike, protocol(arms=(arm,)), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_set_of_other_training_images_is_warned_of_wherever_the_verdict_is(arms, tmp_path):
    with pytest.warns(InputWarning, match="some of these test images may be in it"):
        judged = ours(arms.judged.dataset, Squares(per_class=7))
    results = results_of(Arms(judged, arms.source), protocol(seeds=1), runs_of([0.5], [0.4]), "teacher", None, tmp_path)
    assert "some of these test images may be in it" in results["caution"]
    assert "some of these test images may be in it" in (tmp_path / "report.html").read_text()


def test_hard_labels_need_no_teacher(arms, squares, tmp_path, monkeypatch):
    monkeypatch.setattr("d4m_plugin.teachers.SMALL_SOURCE", 0)  # too many images to train one unasked
    options = {"output": tmp_path / "report", "seeds": 2, "budget": 2, "arms": ()}
    evaluate(str(tmp_path / "set"), squares, labels=("hard",), **options)
    assert json.loads((tmp_path / "report" / "results.json").read_text())["pictures"] == {}
    with pytest.raises(InputError, match="`teacher` is 'auto', but squares has none"):
        evaluate(str(tmp_path / "set"), squares, labels=("hard", "teacher"), **options)


def test_another_network_judges_the_pictures_by_its_own_name(arms, squares, tmp_path, monkeypatch):
    monkeypatch.setattr("d4m_plugin.teachers.SMALL_SOURCE", 0)  # there is no teacher
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # where the random weights lie that torchvision has fetched
    name = torchvision.models.get_model_weights("shufflenet_v2_x0_5").DEFAULT.url.rpartition("/")[2]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(torchvision.models.shufflenet_v2_x0_5().state_dict(), tmp_path / "hub" / "checkpoints" / name)
    options = {"output": tmp_path / "report", "seeds": 1, "budget": 1, "arms": (), "labels": ("hard",)}
    evaluate(str(tmp_path / "set"), squares, features="torchvision:shufflenet_v2_x0_5", **options)
    told = json.loads((tmp_path / "report" / "results.json").read_text())["pictures"]
    assert (told["network"], told["agreement"]) == ("torchvision:shufflenet_v2_x0_5", None)
    assert told["frechet_distance"] > 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert "What the features of torchvision:shufflenet_v2_x0_5 say of the pictures" in page
    assert "Named as their label" not in page
    with pytest.raises(InputError, match="`features` is 'resnet18'; use teacher, inception or torchvision:NAME"):
        evaluate(str(tmp_path / "set"), squares, features="resnet18", **options)
    with pytest.raises(InputError, match="`features` is 'torchvision:resnet19', which cannot be loaded"):
        evaluate(str(tmp_path / "set"), squares, features="torchvision:resnet19", **options)


def test_a_set_that_cannot_be_written_is_judged_all_the_same(arms, squares, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("d4m_plugin.evaluation.evaluate.write_card", refuse)
    monkeypatch.setattr("d4m_plugin.teachers.SMALL_SOURCE", 0)
    options = {"output": tmp_path / "report", "seeds": 2, "budget": 2, "arms": (), "labels": ("hard",)}
    with pytest.warns(InputWarning, match=r"could not be put on the card of .* \(Permission denied\)"):
        rows = evaluate(str(tmp_path / "set"), squares, **options)
    assert rows["report"].is_file()


def test_a_record_keeps_what_was_added_since_the_set_was_read(arms, squares, tmp_path, monkeypatch):
    file = tmp_path / "set" / "ipc-4" / "d4m.json"

    def add(**parts):
        file.write_text(json.dumps(json.loads(file.read_text()) | parts))

    def reported(*args):
        add(meanwhile="labelled")
        write_report(*args)

    monkeypatch.setattr("d4m_plugin.teachers.SMALL_SOURCE", 0)
    monkeypatch.setattr("d4m_plugin.evaluation.evaluate.write_report", reported)
    options = {"output": tmp_path / "report", "seeds": 2, "budget": 2, "arms": (), "labels": ("hard",)}
    evaluate(str(tmp_path / "set"), squares, **options)
    record = json.loads(file.read_text())
    assert record["meanwhile"] == "labelled"
    assert record["results"]["protocol"]["steps"] == 2

    def labelled(*_):
        add(meanwhile="judged")
        return torch.zeros(12, 3, dtype=torch.float16)

    monkeypatch.setattr("d4m_plugin.relabelling.tried_teacher", lambda *_: (None, "names most rightly"))
    monkeypatch.setattr("d4m_plugin.relabelling._logits", labelled)
    relabel(tmp_path / "set", squares)
    record = json.loads(file.read_text())
    assert record["meanwhile"] == "judged"
    assert record["labels"]["tried"] == "names most rightly"


@pytest.mark.parametrize("damage", ["none", "missing", "cut off", "huge", "no picture"])
def test_a_picture_of_the_prototypes_that_cannot_be_shown_is_left_out(arms, tmp_path, damage):
    file = tmp_path / "set" / "ipc-4" / "prototypes.png"
    whole = file.read_bytes()
    edge = struct.pack(">I", 10**5)
    header = b"IHDR" + edge + edge + whole[24:29]
    file.unlink()
    if damage != "missing":
        huge = whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]
        file.write_bytes(
            {"none": whole, "cut off": whole[: len(whole) // 2], "huge": huge, "no picture": b"GIF"}[damage]
        )
    results = results_of(arms, protocol(seeds=1), runs_of([0.5], [0.4]), "teacher", None, tmp_path)
    assert results["pictures"] == {}
    page = (tmp_path / "report.html").read_text()
    assert "The distilled images." in page
    assert ("The prototypes, through the VAE alone." in page) == (damage == "none")


def runs_of(distilled, random, labels="hard"):
    pairs = {"distilled": distilled, "random": random}
    return [
        {"student": "convnet", "labels": labels, "arm": arm, "seed": seed, "accuracy": accuracy}
        | {"accuracies": [1.0, 0.5, 1.0], "confusion": [[1, 0, 0], [0, 1, 1], [0, 0, 3]], "losses": [[1, 1.0]]}
        for arm, accuracies in pairs.items()
        for seed, accuracy in enumerate(accuracies)
    ]


COUNTS = {arm: {"images": images, "bytes": None} for arm, images in (("distilled", 10), ("random", 10), ("real", 100))}


def test_the_interval_is_that_of_the_paired_t_test():
    distilled, random = [0.5, 0.55, 0.52, 0.56], [0.48, 0.5, 0.51, 0.49]
    (_, row) = table_of(runs_of(distilled, random), COUNTS, 1000)
    expected = stats.ttest_rel(distilled, random).confidence_interval(0.95)
    assert row["difference"] - row["interval"] == pytest.approx(expected.low)
    assert row["difference"] + row["interval"] == pytest.approx(expected.high)
    assert interval([0.1]) is None


@pytest.mark.parametrize(
    ("distilled", "random", "verdict", "says"),
    [
        ([0.50, 0.51, 0.52], [0.40, 0.41, 0.42], "better", "is better than as many random real images: +10.0 ± 0.1"),
        (
            [0.40, 0.41, 0.42],
            [0.50, 0.51, 0.53],
            "worse",
            "is worse than as many random real images: \N{MINUS SIGN}10.3 ± 1.4",
        ),
        ([0.50, 0.40, 0.45], [0.45, 0.44, 0.44], "not separable", "cannot be told apart: +0.7 ± 11.2 points, 3 seeds"),
        ([0.50], [0.40], None, "+10.0 points with one seed, which tells nothing"),
    ],
)
def test_the_verdict_is_what_the_interval_allows(distilled, random, verdict, says):
    table = table_of(runs_of(distilled, random), COUNTS, 1000)
    assert [row["verdict"] for row in table] == [None, verdict]
    (sentence,) = sentences(table, 1000)
    assert says in sentence


def test_seeds_that_agree_by_chance_decide_no_difference_of_one_test_image():
    (_, row) = table_of(runs_of([0.501, 0.601], [0.5, 0.6]), COUNTS, 1000)
    assert (row["verdict"], row["interval"]) == ("not separable", 0.001)


@pytest.mark.parametrize(("images", "verdict"), [(25, "not separable"), (68, "not separable"), (75, "worse")])
def test_what_five_test_images_decide_is_chance(images, verdict):
    (_, row) = table_of(runs_of([0.22, 0.22], [0.30, 0.30]), COUNTS, images)
    assert row["verdict"] == verdict
    (sentence,) = sentences([{**row, "arm": "distilled"}, row], images)
    assert f"2 seeds, {images} test images" in sentence
    assert ("cannot be told apart by fewer than 6 test images" in sentence) == (verdict == "not separable")


def test_the_unfavourable_verdict_comes_first():
    good, bad = runs_of([0.5, 0.51], [0.4, 0.41], "teacher"), runs_of([0.4, 0.41], [0.5, 0.51], "hard")
    assert ["worse" in sentence for sentence in sentences(table_of(good + bad, COUNTS, 1000), 1000)] == [True, False]


def test_what_diverged_is_named_and_not_compared():
    fine, lost = runs_of([0.5, 0.6, 0.5], [0.4, 0.5, 0.4], "teacher"), runs_of([0.5, None, 0.5], [None, 0.5, None])
    table = table_of(fine + lost, COUNTS, 1000)
    rows = {(row["labels"], row["arm"]): row for row in table}
    assert (rows["hard", "distilled"]["mean"], rows["hard", "distilled"]["diverged"]) == (0.5, [1])
    assert (rows["hard", "random"]["verdict"], rows["hard", "random"]["difference"]) == ("diverged", None)
    assert rows["teacher", "random"]["verdict"] == "better"
    first, second = sentences(table, 1000)
    assert "are not compared: trainings diverged, of distilled (seed 1) and random (seed 0, 2); lower" in first
    assert "is better" in second
    assert accuracy(rows["hard", "distilled"]) == "50.0 ± 0.0; diverged: seed 1"
    assert dd_ranking(table_of(lost, COUNTS, 1000), "convnet") == {}


def test_a_diverged_training_is_said_to_be_one(arms, squares, tmp_path, monkeypatch):
    monkeypatch.setattr("d4m_plugin.teachers.SMALL_SOURCE", 0)
    options = {"output": tmp_path / "report", "seeds": 2, "budget": 3, "arms": (), "labels": ("hard",)}
    rows = evaluate(str(tmp_path / "set"), squares, learning_rates=(1e30,), **options)
    results = json.loads((tmp_path / "report" / "results.json").read_text(), parse_constant=pytest.fail)
    assert [run["accuracy"] for run in results["runs"]] == [None] * 4
    assert "diverged, of distilled (seed 0, 1) and random (seed 0, 1)" in rows["verdict 1"]
    assert "diverged: seed 0, 1" in rows["report"].read_text()
    assert "diverged: seed 0, 1" in (tmp_path / "set" / "README.md").read_text()


def test_a_learning_rate_that_diverges_is_not_chosen(arms, tmp_path):
    options = {"seeds": 1, "steps": 3, "learning_rates": (1e30, 1e-3)}
    runs = results(arms, protocol(**options), tmp_path / "runs")
    assert {run["lr"] for run in runs} == {1e-3}
    assert None not in {run["accuracy"] for run in runs}


def test_a_sweep_whose_training_diverges_asks_for_a_lower_rate(squares, tmp_path):
    options = {"ipc": 2, "recipe": {"num_inference_steps": 2}, "labels": ("hard",), "seeds": 1, "budget": 3}
    with pytest.raises(InputError, match=r"`lr` is 1e\+30, under which a training diverged \(distilled, hard labels"):
        sweep(squares, tmp_path / "sweep", (1.0,), lr=1e30, **options)


def test_dd_rankings_scores_are_its_formulas():
    runs = runs_of([0.45, 0.47], [0.3, 0.3]) + runs_of([0.6, 0.6], [0.5, 0.52], "teacher")
    runs += [run | {"arm": "real", "accuracy": 0.86} for run in runs_of([0.0, 0.0], [])]
    scores = dd_ranking(table_of(runs, COUNTS, 1000), "convnet")
    assert scores["HLR"] == pytest.approx(0.40)
    assert scores["IOR"] == pytest.approx(0.09)
    alpha = 0.5 * 0.09 - 0.5 * 0.40
    assert scores["LRS"] == pytest.approx((math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1)))


def test_an_evaluation_ends_with_a_verdict_a_report_and_results_on_the_card(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "MOST_POINTS", 100)
    distill(Digits(), Recipe(ipc=2, **CHEAP), output=tmp_path / "digits")
    arms = ("equal_bytes", "real")
    rows = evaluate(str(tmp_path / "digits"), output=tmp_path / "report", seeds=2, budget=2, batch_size=20, arms=arms)
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert list(rows.values())[:-1] == list(results["verdicts"])
    assert {(row["labels"], row["arm"]) for row in results["table"]} == {
        (labels, arm) for labels in ("teacher", "hard") for arm in ("distilled", "random", "equal_bytes", "real")
    }
    (file,) = (tmp_path / "digits").glob("ipc-2/*.parquet")
    taken, held = file.stat().st_size, file.stat().st_size // 64  # the digits are 8 by 8 bytes
    assert 20 < held < 1297
    amounts = {row["arm"]: (row["images"], row["bytes"]) for row in results["table"]}
    assert amounts == {
        "distilled": (20, taken),
        "random": (20, None),
        "equal_bytes": (held, 64 * held),
        "real": (1297, None),
    }
    assert results["set"]["bytes"] == taken
    assert f"random real images in as many bytes ({held:,} of them)" in " ".join(results["verdicts"])
    assert f"{held:,} in {64 * held:,} bytes" in rows["report"].read_text()
    assert 0 < results["pictures"]["agreement"] <= 1
    assert rows["report"].read_text().count("data:image/png") >= 4
    card = (tmp_path / "digits" / "README.md").read_text()
    assert next(iter(results["verdicts"])) in card
    assert f"| equal_bytes | {held:,} in {64 * held:,} bytes |" in card
    assert DistilledDataset(tmp_path / "digits").metadata["results"]["verdicts"] == results["verdicts"]


@pytest.fixture
def folder_of_images(squares, tmp_path):
    """As other methods leave them: a folder for each class, here two images each."""
    chosen = random_subset(squares, 2, seed=5)
    for index in range(len(chosen)):
        image, label = chosen[index]
        folder = tmp_path / "others" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{index}.png")
    return tmp_path / "others", pixels_of(chosen), list(chosen.targets)


def test_a_folder_of_images_by_class_is_a_set(squares, folder_of_images):
    folder, pixels, labels = folder_of_images
    with pytest.warns(InputWarning, match="numbers without names: taken as the labels of squares"):
        judged = open_set(str(folder), squares)
    assert torch.equal(judged.squares.pixels, pixels)
    assert (judged.squares.targets, judged.ipc, judged.image_size) == (labels, 2, 16)
    (folder / "3").mkdir()
    Image.new("RGB", (16, 16)).save(folder / "3" / "0.png")
    with pytest.raises(InputError, match="classes 0, 1, 2, …, which are not among those of squares"):
        open_set(str(folder), squares)


def test_a_file_of_tensors_is_a_set(squares, tmp_path):
    images, labels = torch.rand(6, 3, 16, 16), torch.tensor([0, 0, 1, 1, 2, 2])
    for held in ({"images": images, "labels": labels}, (images, labels)):
        torch.save(held, tmp_path / "set.pt")
        judged = open_set(str(tmp_path / "set.pt"), squares)
        assert torch.equal(judged.squares.pixels, (images * 255).round().to(torch.uint8))
        assert judged.squares.targets == labels.tolist()


@pytest.mark.parametrize(
    ("held", "says"),
    [
        ({"images": torch.zeros(2, 3, 16, 16)}, "does not hold tensors of `images` and `labels`"),
        ((torch.zeros(2, 16, 16), torch.zeros(2)), r"whose images are of shape \(2, 16, 16\)"),
        ((torch.zeros(2, 3, 16, 16) - 1, torch.zeros(2)), r"whose images leave \[0, 1\]; undo the normalisation"),
        ((torch.zeros(2, 3, 16, 16), torch.tensor([0, 3])), r"whose labels leave \[0, 3\)"),
        ((torch.zeros(1, 3, 16, 16), torch.tensor([0])), "which has one image"),
    ],
)
def test_a_file_of_anything_else_is_refused(squares, tmp_path, held, says):
    torch.save(held, tmp_path / "set.pt")
    with pytest.raises(InputError, match=says):
        open_set(str(tmp_path / "set.pt"), squares)


def test_a_set_that_tells_no_model_has_no_arms_of_it(squares, tmp_path):
    torch.save((torch.rand(3, 3, 16, 16), torch.arange(3)), tmp_path / "set.pt")
    arms = Arms(open_set(str(tmp_path / "set.pt"), squares), squares)
    assert len(arms.images("random", 0)) == 3
    with pytest.raises(InputError, match="needs the diffusion model, which set does not tell"):
        arms.images("generated", 0)


def test_sets_of_any_method_are_judged_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "MOST_POINTS", 100)
    trained = []
    train = Trainings._train
    monkeypatch.setattr(Trainings, "_train", lambda self, run, bar: trained.append(run) or train(self, run, bar))
    digits = Digits()
    distill(digits, Recipe(ipc=1, **CHEAP), output=tmp_path / "ours")
    chosen = random_subset(digits, 1, seed=9)
    pixels = torch.stack([to_pixels(chosen[index][0], 32) for index in range(10)])
    torch.save((pixels, torch.tensor(chosen.targets)), tmp_path / "theirs.pt")
    sets = [str(tmp_path / "ours"), str(tmp_path / "theirs.pt")]
    rows = compare(sets, digits, tmp_path / "comparison", labels=("hard",), seeds=2, budget=2, batch_size=10)
    assert [run.arm for run in trained] == ["distilled", "random"] * 2 + ["distilled"] * 2  # random ones serve both
    with (tmp_path / "comparison" / "comparison.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["set"] for row in table] == ["1 digits-ipc-1", "2 theirs"]
    assert table[0]["random"] == table[1]["random"]
    assert (tmp_path / "comparison" / "2-theirs" / "report.html").is_file()
    assert list(rows)[:2] == ["1 digits-ipc-1, convnet, hard", "2 theirs, convnet, hard"]
    with pytest.raises(InputError, match="`distilled_sets` has 1; name at least two"):
        compare(sets[:1], digits)
    torch.save((torch.rand(10, 3, 16, 16), torch.arange(10)), tmp_path / "small.pt")
    distill(digits, Recipe(ipc=1, image_size=16, **CHEAP), output=tmp_path / "smaller")
    with pytest.raises(InputError, match=r"sets of 16 pixels \(crop\) and 32 pixels \(crop\)"):
        compare([str(tmp_path / "smaller"), str(tmp_path / "small.pt")], digits)


def test_a_sweep_tries_all_combinations_and_shares_what_is_alike(squares, tmp_path, monkeypatch):
    made, trained = [], []
    train = Trainings._train
    monkeypatch.setattr(Trainings, "_train", lambda self, run, bar: trained.append(run) or train(self, run, bar))
    encode = LatentDiffusion.encode
    monkeypatch.setattr(LatentDiffusion, "encode", lambda self, few: made.append(len(few)) or encode(self, few))
    options = {"ipc": 2, "recipe": {"num_inference_steps": 4}, "labels": ("hard",), "seeds": 2, "budget": 2}
    rows = sweep(squares, tmp_path / "sweep", (0.5, 1.0), (1.0, 4.0), batch_size=4, **options)
    assert sum(made) == len(squares.train())  # encoded once for eight sets
    assert [run.arm for run in trained].count("distilled") == 8
    assert [run.arm for run in trained].count("random") == 2
    with (tmp_path / "sweep" / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row["strength"], row["guidance_scale"]) for row in table] == [
        ("0.5", "1.0"),
        ("0.5", "4.0"),
        ("1.0", "1.0"),
        ("1.0", "4.0"),
    ]
    assert [row["against_first"] == "" for row in table] == [True, False, False, False]
    assert rows["strength 0.5, guidance_scale 1.0, hard labels"].endswith("points over random real images)")
    assert "points over the first" in rows["strength 1.0, guidance_scale 4.0, hard labels"]
    for picture in ("sweep.png", "samples.png"):
        assert len(set(Image.open(tmp_path / "sweep" / picture).convert("L").tobytes())) > 10
    assert next(iter(rows)) == "strength 0.5, guidance_scale 1.0, hard labels"
    sweep(squares, tmp_path / "sweep", (0.5, 1.0), (1.0, 4.0), batch_size=4, **options)
    assert len(trained) == 10


def test_the_line_of_a_sweep_goes_from_least_to_most(tmp_path, monkeypatch):
    figure = figures.new_figure(5, 4)
    monkeypatch.setattr("d4m_plugin.evaluation.sweep.new_figure", lambda *_: figure)
    alike = {"labels": "hard", "interval": None, "random": 0.1}
    rows = [{"strength": strength, "accuracy": strength / 2} | alike for strength in (0.7, 0.1, 0.5)]
    _draw(rows, ["strength"], "squares", tmp_path / "sweep.png")
    line = figure.axes[0].lines[0]
    assert line.get_xdata().tolist() == [0.1, 0.5, 0.7]
    assert line.get_ydata().tolist() == [5.0, 25.0, 35.0]


class Guessing(torch.nn.Module):
    """A teacher that has learnt nothing."""

    def forward(self, images):
        return torch.zeros(len(images), 3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"student": "resnt18"}, "`student` is 'resnt18'"),
        ({"teacher": "lst.ckpt"}, "`teacher` is 'lst.ckpt'"),
        ({"lr": 0.0}, "`lr` is 0.0"),
        ({"ipc": 200}, "`ipc` is 200, but class 'red' has"),
        ({"teacher": Guessing()}, "`teacher` names 33% of"),
    ],
)
def test_a_sweep_that_could_not_train_distils_nothing(squares, tmp_path, monkeypatch, options, says):
    monkeypatch.setattr("d4m_plugin.evaluation.sweep.distill", lambda *_, **__: pytest.fail("a set was made"))
    with pytest.raises(InputError, match=says):
        sweep(squares, tmp_path / "sweep", (0.5, 1.0), **options)


def test_an_unknown_student_is_told_before_the_first_one_is_trained(arms, tmp_path):
    with pytest.raises(InputError, match="`student` is 'resnt18'"):
        Trainings(arms, protocol(students=("convnet", "resnt18")), tmp_path / "runs")


def test_a_sweep_over_oversampling_lets_its_own_teacher_choose(squares, tmp_path):
    options = {"ipc": 2, "recipe": {"num_inference_steps": 4}, "labels": ("hard",), "seeds": 1, "budget": 2}
    with pytest.raises(InputError, match="`teacher` is 'nobody'"):
        sweep(squares, tmp_path / "sweep", oversample=(1, 2), teacher="nobody", batch_size=4, **options)
    assert (tmp_path / "sweep").exists()
    made = [path for path in Path(os.environ["D4M_CACHE"], "sets").iterdir() if path.suffix != ".partial"]
    assert len(made) == 1  # the set of one try


def test_gains_are_paired_by_seed_and_the_p_value_is_that_of_the_independent_t_test():
    first, other, of_random = [0.5, 0.52, 0.51], [0.55, 0.57, 0.54], [0.4, 0.41, 0.42]
    row = setting_row(other, first, of_random, 1000)
    for name, gains in (("first", [0.05, 0.05, 0.03]), ("random", [0.15, 0.16, 0.12])):
        assert row[f"against_{name}"] == pytest.approx(sum(gains) / 3)
        assert row[f"against_{name}_interval"] == pytest.approx(stats.t.ppf(0.975, 2) * stats.sem(gains))
    assert row["p_against_first"] == pytest.approx(stats.ttest_ind(other, first).pvalue)
    assert row["interval"] == pytest.approx(stats.t.ppf(0.975, 2) * stats.sem(other))
    alone = setting_row(first, first, of_random, 1000)
    assert alone["p_against_first"] is alone["against_first"] is alone["against_first_interval"] is None
    assert setting_row([0.25] * 3, first, first, 1000)["p_against_first"] < 1
    alike = setting_row([0.25] * 3, [0.5] * 3, first, 1000)
    assert alike["p_against_first"] is None  # and no warning
    assert alike["against_first_interval"] == 0.001  # no finer than a test image


def test_a_sweep_of_nothing_or_of_what_is_given_twice_is_refused(squares):
    with pytest.raises(InputError, match="`recipe` has 'steps'; it takes other options of the Recipe"):
        sweep(squares, strength=(0.5,), recipe={"steps": 3})
    with pytest.raises(InputError, match="`recipe` has 'strength'"):
        sweep(squares, strength=(0.5,), recipe={"strength": 0.3})
    with pytest.raises(InputError, match="nothing is varied; give values of `strength`, `guidance_scale`"):
        sweep(squares)


def test_a_full_disk_ends_an_evaluation_with_a_sentence(squares, tmp_path, monkeypatch, run):
    distill(squares, Recipe(ipc=2, **CHEAP), output=tmp_path / "set")

    def full(path, row):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "save_json", full)
    options = ["--source", "tests.toys.Squares", "--labels", "[hard]", "--seeds", "1", "--budget", "1"]
    status, _, said = run("evaluate", tmp_path / "set", "--output", tmp_path / "report", *options)
    assert status == 2
    sentence = "the disk could not be used (No space left on device); what is done is kept: mend that and start again."
    assert said.splitlines()[-1] == f"error: {sentence}"


def test_ctrl_c_in_a_training_is_no_end_without_a_word(arms, tmp_path, monkeypatch):
    def pressed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs._Curve, "on_train_batch_end", pressed)
    with pytest.raises(KeyboardInterrupt):
        results(arms, protocol(), tmp_path / "runs")
    assert not list((tmp_path / "runs").glob("*.json"))


def test_random_images_are_drawn_anew_for_each_seed(arms, tmp_path, monkeypatch):
    asked, images = [], Arms.images
    monkeypatch.setattr(Arms, "images", lambda self, arm, seed: asked.append((arm, seed)) or images(self, arm, seed))
    results(arms, protocol(steps=1), tmp_path / "runs")
    assert sorted(asked) == [("distilled", 0), ("distilled", 1), ("random", 0), ("random", 1)]


def test_a_sweep_makes_a_set_for_each_seed(squares, tmp_path):
    options = {"ipc": 2, "recipe": {"num_inference_steps": 4}, "labels": ("hard",), "seeds": 2, "budget": 1}
    sweep(squares, tmp_path / "sweep", (0.5, 1.0), batch_size=4, **options)
    made = Path(os.environ["D4M_CACHE"]).glob("sets/*/*/d4m.json")
    assert sorted(json.loads(each.read_text())["recipe"]["seed"] for each in made) == [0, 0, 1, 1]


def test_generated_images_start_from_noise_whatever_the_sets_strength(squares, tmp_path):
    generated = []
    for strength in (0.5, 1.0):
        recipe = Recipe(ipc=2, num_inference_steps=4, strength=strength)
        made = distill(squares, recipe, output=tmp_path / f"{strength}")
        generated.append(pixels_of(Arms(ours(made, squares), squares, squares.diffusion).images("generated", 0)))
    assert torch.equal(*generated)


def test_an_arm_of_which_one_seed_diverged_is_not_compared():
    (_, row) = table_of(runs_of([0.5, None, 0.5], [0.4, 0.4, 0.4]), COUNTS, 1000)
    assert (row["verdict"], row["difference"]) == ("diverged", None)


@pytest.mark.parametrize(("name", "value"), [("mean", (0.1,) * 3), ("flip", False)])
def test_what_students_see_and_the_version_decide_a_training(arms, tmp_path, monkeypatch, name, value):
    def files():
        return {each.file for each in Trainings(arms, protocol(), tmp_path / "runs").of_seeds()}

    first = files()
    with monkeypatch.context() as patch:
        patch.setattr(Squares, name, value)
        assert files().isdisjoint(first)
    monkeypatch.setattr("d4m_plugin.evaluation.runs.version", lambda _: "99")
    assert files().isdisjoint(first)
