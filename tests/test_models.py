import math

import pytest
import torch

from d4m_plugin import ConvNet, D4MDataModule, ImageClassifier, InputError
from d4m_plugin.models import create_student
from d4m_plugin.models.classifier import decay_groups
from tests.test_datamodule import quiet_trainer
from tests.toys import Squares


def test_the_convnet_is_the_fields():
    """320,010 parameters for 10 classes at 32x32, as published with the ConvNet of dataset condensation."""
    assert sum(parameter.numel() for parameter in ConvNet(10).parameters()) == 320_010


@pytest.mark.parametrize(
    "name", ["convnet", "resnet18", "mobilenet_v2", "efficientnet_b0", "swin_t", "vit_b_16", "googlenet"]
)
def test_students_take_small_images(name):
    student = create_student(name, num_classes=7, image_size=32).eval()
    with torch.no_grad():
        assert student(torch.randn(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(("name", "size"), [("inception_v3", 32), ("vit_b_16", 28)])
def test_a_student_that_an_image_does_not_suit_is_named(name, size):
    with pytest.raises(InputError, match=f"`student` is '{name}', which cannot take images of {size} pixels"):
        create_student(name, 7, size)


@pytest.mark.parametrize(("size", "edge"), [(32, 4), (64, 8), (224, 7)])
def test_a_resnet_keeps_enough_of_a_small_image(size, edge):
    student = create_student("resnet18", 7, size).eval()
    shapes = []
    student.layer4.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[-1]))
    with torch.no_grad():
        student(torch.randn(1, 3, size, size))
    assert shapes == [edge]


@pytest.mark.parametrize("name", ["resnet19", "os", "fcn_resnet50"])
def test_an_unknown_student_is_named(name):
    with pytest.raises(InputError, match=f"`student` is '{name}'"):
        ImageClassifier(10, student=name)


def test_only_matrices_decay():
    groups = decay_groups(ConvNet(10).parameters(), 0.01)
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    assert {p.ndim for p in groups[0]["params"]} == {2, 4}
    assert {p.ndim for p in groups[1]["params"]} == {1}
    assert sum(len(group["params"]) for group in groups) == len(list(ConvNet(10).parameters()))


@pytest.mark.parametrize(("smoothing", "last"), [(1.0, 0.0), (2.0, 0.5)])
def test_the_schedule_ends_where_its_smoothing_says(smoothing, last):
    module = ImageClassifier(3, image_size=16, lr=0.1, lr_smoothing=smoothing)
    trainer = quiet_trainer(max_steps=8)
    trainer.fit(module, datamodule=D4MDataModule(Squares(), train_on="real", batch_size=9))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * last)


def test_a_longer_run_that_resumes_has_the_longer_schedule(tmp_path):
    data, rates = D4MDataModule(Squares(), train_on="real", batch_size=9), []

    class Told(ImageClassifier):
        def on_train_batch_end(self, *_):
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    for steps, checkpoint in ((4, None), (8, tmp_path / "last.ckpt")):
        trainer = quiet_trainer(max_steps=steps)
        trainer.fit(Told(3, image_size=16, lr=0.1), datamodule=data, ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    # After each step: four of four, then the last four of eight.
    assert rates == pytest.approx(
        [0.05 * (1 + math.cos(math.pi * n / 4)) for n in range(1, 5)]
        + [0.05 * (1 + math.cos(math.pi * n / 8)) for n in range(5, 9)]
    )


def test_a_rate_that_is_found_is_the_schedules_own():
    found, rates = 0.3, []

    class Finds(ImageClassifier):
        def on_fit_start(self):  # as a LearningRateFinder does, after the schedule is made
            self.lr = found
            self.trainer.optimizers[0].param_groups[0]["lr"] = found

        def on_train_batch_start(self, *_):
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    quiet_trainer(max_steps=4).fit(
        Finds(3, image_size=16), datamodule=D4MDataModule(Squares(), train_on="real", batch_size=9)
    )
    assert rates == pytest.approx([found * (1 + math.cos(math.pi * n / 4)) / 2 for n in range(4)])


@pytest.mark.filterwarnings("ignore:.*")
def test_a_learning_rate_finder_runs_beside_the_bar(run):
    words = ["--data.train_on", "random", "--data.ipc", "2", "--matching.teacher", "null", "--trainer.max_steps", "3"]
    finder = ["--trainer.callbacks", "LearningRateFinder", "--trainer.callbacks.num_training_steps", "10"]
    status, out, err = run("fit", *words, *finder)
    assert status == 0, err
    assert "accuracy on real test images" in out


def test_a_schedule_cannot_end_early():
    with pytest.raises(InputError, match=r"`lr_smoothing` is 0\.5; it must be at least 1"):
        ImageClassifier(3, lr_smoothing=0.5)
