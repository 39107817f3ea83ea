import lightning as L
import pytest
import torch
from torch import nn

from d4m_plugin import D4MDataModule, ImageClassifier, InputError, Teacher
from d4m_plugin.teachers import load_teacher, save_teacher
from tests.toys import Squares


class FirstPixel(nn.Module):
    """Logits (r, g, b) of the first pixel."""

    def forward(self, images):
        return images[:, :, 0, 0]


def teacher(classes=("red", "green / blue", "ünï 🦆"), image_size=16):
    return Teacher(FirstPixel(), classes, image_size, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0))


def test_a_teacher_normalises_by_its_own_statistics():
    images = torch.full((1, 3, 16, 16), 0.75)
    torch.testing.assert_close(teacher()(images), torch.tensor([[1.0, 0.5, 0.25]]))


def test_a_teacher_sees_its_own_size():
    sizes = []
    resized = teacher(image_size=8)
    resized.model.register_forward_hook(lambda module, inputs, output: sizes.append(inputs[0].shape))
    resized(torch.rand(2, 3, 16, 16))
    assert sizes == [(2, 3, 8, 8)]


def test_classes_are_matched_by_name_in_any_order():
    other = teacher((*("ünï 🦆", "something else", "red", "green / blue")[:1], "red", "green / blue"))
    matched = load_teacher(other, Squares())
    images = torch.rand(2, 3, 16, 16)
    assert matched.classes == ["red", "green / blue", "ünï 🦆"]
    assert torch.equal(matched(images), other(images)[:, [1, 2, 0]])


def test_a_teacher_of_other_classes_is_refused():
    with pytest.raises(InputError, match="does not know 2 of 3 classes of squares, such as 'green / blue'"):
        load_teacher(teacher(("red", "blue", "yellow")), Squares())


def test_a_teacher_stays_frozen():
    frozen = nn.Sequential(Teacher(nn.BatchNorm2d(3), ("a",), 4, (0, 0, 0), (1, 1, 1))).train()
    assert not any(module.training for module in frozen[0].modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not frozen(torch.rand(2, 3, 4, 4, requires_grad=True)).requires_grad


@pytest.fixture
def checkpoint(tmp_path):
    module = ImageClassifier(3, image_size=16)
    trainer = L.Trainer(max_steps=1, logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(module, datamodule=D4MDataModule(Squares(), train_on="real"))
    trainer.save_checkpoint(tmp_path / "teacher.ckpt")
    return tmp_path / "teacher.ckpt", module.eval()


def test_a_checkpoint_of_real_training_is_a_teacher(checkpoint, tmp_path):
    path, module = checkpoint
    found = load_teacher(path, Squares())
    images = torch.rand(2, 3, 16, 16)
    mean, std = torch.tensor(Squares.mean).view(3, 1, 1), torch.tensor(Squares.std).view(3, 1, 1)
    torch.testing.assert_close(found(images), module((images - mean) / std))

    save_teacher(path, tmp_path / "teacher.safetensors")
    saved = load_teacher(tmp_path / "teacher.safetensors", Squares())
    torch.testing.assert_close(saved(images), found(images), atol=1e-2, rtol=1e-2)  # half precision
    assert saved.classes == found.classes


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("auto", "`teacher` is 'auto', but squares has none"),
        ("nonsense", "`teacher` is 'nonsense', neither"),
        ("missing.ckpt", "`teacher` is 'missing.ckpt', neither"),
        ("torchvision:resnet19", "`teacher` is 'torchvision:resnet19'"),
    ],
)
def test_an_unknown_teacher_is_named(name, says):
    with pytest.raises(InputError) as error:
        load_teacher(name, Squares())
    assert says in str(error.value)


def test_a_checkpoint_of_something_else_is_named(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "empty.ckpt").touch()
    for name in ("other.ckpt", "text.ckpt", "empty.ckpt"):
        with pytest.raises(InputError, match=f"{name}', which is no checkpoint of an ImageClassifier"):
            load_teacher(tmp_path / name, Squares())
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(InputError, match=r"text.safetensors', which is no safetensors file"):
        load_teacher(tmp_path / "text.safetensors", Squares())
