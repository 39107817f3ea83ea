import os
import warnings

import lightning as L
import pytest
import torch
import torchvision
from torch import nn
from transformers import (
    ConvNextImageProcessor,
    EfficientNetImageProcessor,
    MobileViTImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from d4m_plugin import D4MDataModule, ImageClassifier, InputError, Teacher
from d4m_plugin.errors import InputWarning
from d4m_plugin.sources.names import imagenet_ids, match_classes, readable, wordnet
from d4m_plugin.teachers import check_above_chance, load_teacher, save_teacher, teacher_digest
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
    with pytest.raises(InputError, match=r"does not know 2 of 3 classes of squares \('green / blue', 'ünï 🦆'\)"):
        load_teacher(teacher(("red", "blue", "yellow")), Squares())


def test_a_teacher_stays_frozen():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 2))
    frozen = nn.Sequential(Teacher(network, ("a", "b"), 4, (0, 0, 0), (1, 1, 1))).train()
    assert not any(module.training for module in frozen[0].modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not frozen(torch.rand(2, 3, 4, 4, requires_grad=True)).requires_grad


def test_a_module_that_teaches_stays_as_it_is():
    network = nn.Sequential(nn.Flatten(), nn.Linear(768, 3)).train()
    load_teacher(network, Squares())
    assert all(module.training for module in network.modules())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_teacher_of_too_many_outputs_is_named():
    with pytest.raises(InputError, match="`teacher` returns no logits of 3 classes"):
        check_above_chance(load_teacher(nn.Sequential(nn.Flatten(), nn.Linear(768, 5)), Squares()), Squares())


class Unbalanced(Squares):
    """Nine test images of ten are red."""

    def test(self):
        images = super().test()
        images.targets = [0] * (len(images) - 1) + [1]
        return images


class Always(nn.Module):
    def forward(self, images):
        return torch.tensor([1.0, 0.0, 0.0]).repeat(len(images), 1)


class ByColour(nn.Module):
    def forward(self, images):
        return images.mean((2, 3))


def test_naming_the_largest_class_is_chance():
    with pytest.raises(InputError, match=r"it is told from chance \(50%\)"):
        check_above_chance(Teacher(Always(), Squares().classes, 16, (0, 0, 0), (1, 1, 1)), Unbalanced())


def test_few_images_are_enough_for_a_good_teacher():
    source = Squares(classes=("red", "green"))
    good = Teacher(nn.Sequential(ByColour(), nn.Linear(3, 2)), source.classes, 16, (0, 0, 0), (1, 1, 1))
    good.model[1].weight.data, good.model[1].bias.data = torch.eye(2, 3), torch.zeros(2)
    assert check_above_chance(good, source).startswith("names 100% of 8 ")


TRAINS_OR_WAITS = """
import sys, time
from pathlib import Path
import torch
import d4m_plugin.teaching
from tests.toys import Squares

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
d4m_plugin.teaching.LEAST_STEPS = 3
if rank == 0:
    d4m_plugin.teaching.train_teacher(Squares(), folder / "teacher.safetensors")
while not (folder / "teacher.safetensors").exists():
    time.sleep(0.1)
"""


def test_a_teacher_is_trained_by_one_process_while_the_other_waits(forks, tmp_path):
    """As where `fit` runs on several devices: they form a process group."""
    script, folders = tmp_path / "trains_or_waits.py", [tmp_path / rank for rank in "01"]
    script.write_text(TRAINS_OR_WAITS)
    for folder in folders:
        folder.mkdir()
    both = [forks.start(script, tmp_path, rank, folder=folder) for rank, folder in enumerate(folders)]
    try:
        said = [process.communicate(timeout=120)[1] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], said
    assert load_teacher(str(tmp_path / "teacher.safetensors"), Squares()).classes == list(Squares().classes)


def test_what_is_no_number_of_a_teacher_stays_whole(tmp_path):
    """Swin's attention looks its positions up by whole numbers."""
    module = ImageClassifier(3, image_size=32, student="swin_t")
    trainer = L.Trainer(max_steps=0, logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(module, datamodule=D4MDataModule(Squares(), train_on="real", image_size=32))
    trainer.save_checkpoint(tmp_path / "teacher.ckpt")
    save_teacher(tmp_path / "teacher.ckpt", tmp_path / "teacher.safetensors")
    images, module = torch.rand(2, 3, 32, 32), module.eval()
    for file in ("teacher.ckpt", "teacher.safetensors"):
        found = load_teacher(str(tmp_path / file), Squares())
        with torch.no_grad():
            torch.testing.assert_close(found.model(images), module(images), atol=1e-2, rtol=1e-2)


@pytest.fixture
def checkpoint(tmp_path, request):
    module = ImageClassifier(3, 16, getattr(request, "param", "convnet"))
    trainer = L.Trainer(max_steps=1, logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(module, datamodule=D4MDataModule(Squares(), train_on="real"))
    trainer.save_checkpoint(tmp_path / "teacher.ckpt")
    return tmp_path / "teacher.ckpt", module.eval()


@pytest.mark.parametrize("checkpoint", ["convnet", "regnet_x_400mf"], indirect=True)
def test_a_checkpoint_of_real_training_is_a_teacher(checkpoint, tmp_path):
    path, module = checkpoint
    found = load_teacher(path, Squares())
    images = torch.rand(2, 3, 16, 16)
    mean, std = torch.tensor(Squares.mean).view(3, 1, 1), torch.tensor(Squares.std).view(3, 1, 1)
    torch.testing.assert_close(found(images), module((images - mean) / std), atol=0.02, rtol=0.02)  # bfloat16

    save_teacher(path, tmp_path / "teacher.safetensors")
    saved = load_teacher(tmp_path / "teacher.safetensors", Squares())
    torch.testing.assert_close(saved(images), found(images), atol=1e-2, rtol=1e-2)  # half precision
    assert saved.classes == found.classes


def test_a_plain_module_takes_what_the_students_take():
    found = load_teacher(FirstPixel(), Squares())
    images = torch.rand(2, 3, 16, 16)
    mean, std = torch.tensor(Squares.mean).view(3, 1, 1), torch.tensor(Squares.std).view(3, 1, 1)
    torch.testing.assert_close(found(images), ((images - mean) / std)[:, :, 0, 0])
    assert load_teacher(FirstPixel(), Squares(), image_size=32).image_size == 32  # where students see other squares


@pytest.fixture
def vit(tmp_path):
    """The folder of a transformers classifier with random weights."""
    labels = {0: "Red", 1: "something else", 2: "ünï_🦆", 3: "green / blue"}
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    config.id2label, config.label2id = labels, {name: label for label, name in labels.items()}
    model = ViTForImageClassification(config)
    model.save_pretrained(tmp_path)
    size = {"height": 8, "width": 8}
    ViTImageProcessor(size=size, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)
    return tmp_path, model.eval()


def test_a_transformers_classifier_brings_its_size_normalisation_and_names(vit):
    path, model = vit
    found = load_teacher(f"transformers:{path}", Squares())
    pixels = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    inputs = ViTImageProcessor.from_pretrained(path)(list(pixels), return_tensors="pt", do_resize=False)
    expected = model(inputs.pixel_values).logits[:, [0, 3, 2]]
    torch.testing.assert_close(found(pixels / 255), expected, atol=0.02, rtol=0.02)  # half precision
    assert found.image_size == 8


@pytest.mark.parametrize(
    ("processor", "size", "mean", "std"),
    [
        (EfficientNetImageProcessor(size={"height": 12, "width": 12}), 12, [0.5] * 3, [0.25] * 3),  # twice normalised
        (ViTImageProcessor(size={"height": 12, "width": 12}, do_normalize=False), 12, [0.0] * 3, [1.0] * 3),
        (ViTImageProcessor(do_resize=False, image_mean=[0.1, 0.2, 0.3]), 8, [0.1, 0.2, 0.3], [0.5] * 3),
        (ConvNextImageProcessor(size={"shortest_edge": 24}), 24, [0.5] * 3, [0.5] * 3),
        (MobileViTImageProcessor(size={"shortest_edge": 12}, crop_size={"height": 10, "width": 10}), 10, None, None),
    ],
)
def test_what_a_transformers_classifier_sees_is_what_its_processor_makes(vit, processor, size, mean, std):
    folder, _ = vit
    processor.save_pretrained(folder)
    found = load_teacher(f"transformers:{folder}", Squares())
    assert found.image_size == size
    if mean is None:  # of BGR images
        image = torch.rand(1, 3, size, size)
        found.model[1] = FirstPixel()
        assert found.model((image - found.mean) / found.std).tolist() == image.flip(1)[:, :, 0, 0].tolist()
    else:
        torch.testing.assert_close((found.mean.flatten(), found.std.flatten()), tuple(map(torch.tensor, (mean, std))))


def test_a_transformers_classifier_in_half_precision_teaches(vit):
    folder, model = vit
    model.half().save_pretrained(folder)
    found = load_teacher(f"transformers:{folder}", Squares())
    assert found(torch.rand(2, 3, 8, 8)).isfinite().all()
    assert next(found.parameters()).dtype == torch.float32


@pytest.mark.parametrize("form", ["tuple", "mapping"])
def test_classes_are_ordered_whatever_form_the_logits_have(form):
    class Wrapped(FirstPixel):
        def forward(self, images):
            logits = super().forward(images)
            return (logits, images) if form == "tuple" else {"logits": logits}

    theirs = Teacher(Wrapped(), ["ünï 🦆", "red", "green / blue"], 16, (0, 0, 0), (1, 1, 1))
    found = load_teacher(theirs, Squares())
    images = torch.rand(2, 3, 16, 16)
    assert found(images).tolist() == images[:, [1, 2, 0], 0, 0].tolist()
    assert found.classes == list(Squares().classes)
    assert (
        load_teacher(found, Squares(classes=Squares().classes[::-1]))(images).tolist()
        == images[:, [0, 2, 1], 0, 0].tolist()
    )  # ordered again


def test_a_torchvision_classifier_brings_imagenets_names(tmp_path, monkeypatch):
    """Random weights, where torchvision looks for those that it has fetched."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT
    model = torchvision.models.squeezenet1_1().eval()
    file = tmp_path / "hub" / "checkpoints" / weights.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.save(model.state_dict(), file)
    found = load_teacher("torchvision:squeezenet1_1", Squares(classes=("crane", "crane bird", "tabby cat")))
    images = torch.rand(2, 3, 224, 224)
    expected = model((images - found.mean) / found.std)[:, [517, 134, 281]]
    torch.testing.assert_close(found(images), expected, atol=0.02, rtol=0.02)

    torch.save({"evil": Exploit()}, file)
    with pytest.raises(
        InputError, match="'torchvision:squeezenet1_1', which cannot be loaded: Weights only load failed"
    ):
        load_teacher("torchvision:squeezenet1_1", Squares())


class Exploit:
    def __reduce__(self):
        return print, ("a teacher's file has run code",)


def test_imagenets_classes_are_known_by_any_library_s_names():
    ours = [readable(each) for each in imagenet_ids()]
    transformers = [wordnet()[each].removeprefix("crane bird, ") for each in imagenet_ids()]  # 134 is "crane" as well
    assert (transformers[134], transformers[517]) == ("crane", "crane")
    for theirs in (ours, transformers, list(imagenet_ids())):
        assert match_classes(["crane", "crane bird"], theirs) == ([517, 134], [])
        assert match_classes(["n02012849", "white shark", "Tabby_cat"], theirs) == ([134, 2, 281], [])
        assert match_classes(ours, theirs) == (list(range(1000)), [])


def test_a_name_that_could_be_two_classes_is_missing():
    assert match_classes(["\u00e9t\u00e9", "Chat"], ["chat", "e\u0301te\u0301"]) == ([1, 0], [])  # of Linux, of macOS
    assert match_classes(["Cat", "dog"], ["cat", "CAT", "dog"]) == ([2], ["Cat"])
    assert match_classes(["Cat", "CAT", "dog"], ["cat", "dog"]) == ([1], ["Cat", "CAT"])


def test_the_teacher_of_a_small_source_is_trained_once(monkeypatch, tmp_path):
    monkeypatch.setattr("d4m_plugin.teaching.LEAST_STEPS", 2)
    before = dict(os.environ)
    torch.manual_seed(0)
    first, then = load_teacher("auto", Squares(), tmp_path), torch.rand(3)
    assert dict(os.environ) == before  # where Lightning keeps seeds
    assert len(list((tmp_path / "teachers").glob("squares-*.safetensors"))) == 1
    monkeypatch.setattr("d4m_plugin.teaching.train_teacher", None)
    torch.manual_seed(0)
    again = load_teacher("auto", Squares(), tmp_path)
    assert torch.equal(torch.rand(3), then)  # training it took nothing from the caller's random numbers
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(again(images), first(images))
    larger = Squares()
    larger.image_size = 24
    with pytest.raises(TypeError):  # another is trained for other images, here by nothing
        load_teacher("auto", larger, tmp_path)


@pytest.mark.parametrize("damage", ["cut off", "changed"])
def test_a_damaged_teacher_of_the_cache_is_told_and_trained_again(monkeypatch, tmp_path, damage):
    monkeypatch.setattr("d4m_plugin.teaching.LEAST_STEPS", 2)
    images = torch.rand(2, 3, 16, 16)
    expected = load_teacher("auto", Squares(), tmp_path)(images)
    (file,) = (tmp_path / "teachers").glob("squares-*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-100] + (bytes(100) if damage == "changed" else b""))
    with pytest.warns(InputWarning, match=r"It is trained again\."):
        assert torch.equal(load_teacher("auto", Squares(), tmp_path)(images), expected)
    with warnings.catch_warnings(action="error", category=InputWarning):
        load_teacher("auto", Squares(), tmp_path)


def test_no_teacher_is_trained_unasked_on_many_images(monkeypatch):
    monkeypatch.setattr("d4m_plugin.teachers.SMALL_SOURCE", 10)
    with pytest.raises(InputError, match="'auto', but squares has none, and its 18 images of 16 pixels are too many"):
        load_teacher("auto", Squares())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nonsense", "`teacher` is 'nonsense', neither"),
        ("missing.ckpt", "`teacher` is 'missing.ckpt', neither"),
        ("torchvision:resnet19", "`teacher` is 'torchvision:resnet19', which cannot be loaded: Unknown model resnet19"),
        ("transformers:nobody/nothing", "`teacher` is 'transformers:nobody/nothing', which cannot be loaded"),
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


@pytest.mark.parametrize("form", ["{}", "transformers:{}"])
def test_a_teacher_in_a_file_or_folder_is_told_by_what_it_holds(tmp_path, monkeypatch, form):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "vit"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"one")
    names = [form.format(name) for name in (folder, "~/vit")]
    before = [teacher_digest(name) for name in names]
    (folder / "model.safetensors").write_bytes(b"two")
    assert not {*before} & {teacher_digest(name) for name in names}
    assert before[0] == before[1]
    assert [teacher_digest(name) for name in ("auto", "torchvision:resnet18")] == ["auto", "torchvision:resnet18"]


def test_a_teacher_of_other_images_is_another(monkeypatch, tmp_path):
    monkeypatch.setattr("d4m_plugin.teaching.LEAST_STEPS", 2)
    for per_class in (6, 5):
        load_teacher("auto", Squares(per_class), tmp_path)
    assert len(list((tmp_path / "teachers").glob("squares-*.safetensors"))) == 2
