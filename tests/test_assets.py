import pytest
import torch

from d4m_plugin import D4MDataModule, Digits, LatentDiffusion
from d4m_plugin.diffusion import ASSETS
from d4m_plugin.teachers import load_teacher


@pytest.mark.parametrize(("name", "most"), [("digits", 12e6), ("cifar10", 40e6)])
def test_the_embedded_models_are_small_and_say_nothing_of_where_they_were_made(name, most):
    files = [path for path in (ASSETS / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= most
    assert not [path for path in files if path.suffix == ".json" and "_name_or_path" in path.read_text()]


def test_the_embedded_teacher_knows_real_digits_it_was_not_trained_on():
    data = D4MDataModule()
    teacher = load_teacher("auto", data.source)
    images, labels = (torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True))
    accuracy = (teacher(images / 255).argmax(1) == labels).float().mean()
    assert len(labels) == 500
    assert accuracy > 0.97


class Known(Digits):
    """Stands for CIFAR-10, whose own images are not in the package: the classes alone."""

    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def test_the_embedded_pipeline_draws_the_digit_that_it_is_told():
    """From pure noise, guided by the prompt alone; judged by the teacher."""
    model = LatentDiffusion("digits")
    labels = torch.arange(50) % 10
    generators = [torch.Generator().manual_seed(i) for i in range(50)]
    latents = model.denoise(
        torch.zeros(50, 4, 8, 8),
        [str(label.item()) for label in labels],
        generators,
        strength=1.0,
        num_inference_steps=20,
        guidance_scale=4.0,
    )
    teacher = load_teacher("auto", Digits())
    right = teacher(model.decode(latents) / 255).argmax(1) == labels
    assert right.float().mean() > 0.9


def test_the_embedded_pipeline_draws_the_photograph_that_it_is_told():
    """From pure noise, guided by the prompt alone; judged by the embedded teacher, trained on real photographs."""
    model = LatentDiffusion("cifar10")
    teacher = load_teacher("cifar10", Known())
    labels = torch.arange(30) % 10
    latents = model.denoise(
        torch.zeros(30, 4, 16, 16),
        [teacher.classes[label] for label in labels],
        [torch.Generator().manual_seed(i) for i in range(30)],
        strength=1.0,
        num_inference_steps=10,
        guidance_scale=4.0,
    )
    right = teacher(model.decode(latents) / 255).argmax(1) == labels
    assert right.float().mean() > 0.7


def test_the_split_is_fixed_and_stratified():
    digits = Digits()
    train, test = torch.tensor(digits.train().targets), torch.tensor(digits.test().targets)
    assert (len(train), len(test)) == (1297, 500)
    shares = torch.stack([train.bincount() / 1297, test.bincount() / 500])
    torch.testing.assert_close(shares[0], shares[1], atol=0.002, rtol=0)
    assert digits.fingerprint == "db5f7c516e41a0f21fc308a50a383e32a73f28a0ffafd3f218ec1bb766207fd8"


@pytest.mark.parametrize("split", ["train", "test"])
def test_digits_are_shown_at_32_pixels(split):
    image, label = getattr(Digits(), split)()[0]
    assert (image.size, image.mode) == ((32, 32), "RGB")
    assert label in range(10)
