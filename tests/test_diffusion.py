import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from d4m_plugin import Digits, InputError, LatentDiffusion
from d4m_plugin.diffusion import ASSETS
from d4m_plugin.seeding import generator_of

LATENTS = torch.randn(4, 4, 8, 8, generator=generator_of(0))
PROMPTS = ["0", "1", "2", "0"]


def generators():
    return [generator_of(1, index) for index in range(4)]


@pytest.fixture(scope="module")
def embedded():
    return LatentDiffusion("digits", dtype=torch.float32)


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 8.0, "strength": 0.7},
        {"guidance_scale": 8.0, "strength": 1.0, "negative_prompt": "9"},
        {"guidance_scale": 1.0, "strength": 0.5},
    ],
    ids=["guided", "negative", "unguided"],
)
def test_a_batch_equals_the_stock_pipeline_called_once_an_image(embedded, options):
    stock = StableDiffusionImg2ImgPipeline.from_pretrained(ASSETS / "digits", dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    expected = [
        stock(
            prompt=prompt,
            image=latents[None],
            generator=generator,
            num_inference_steps=10,
            output_type="pt",
            **options,
        ).images[0]
        for prompt, latents, generator in zip(PROMPTS, LATENTS, generators(), strict=True)
    ]
    latents = embedded.denoise(LATENTS, PROMPTS, generators(), num_inference_steps=10, **options)
    pixels = embedded.decode(latents)
    assert (pixels / 255 - torch.stack(expected)).abs().max() < 1.01 / 255


def test_latents_are_the_scaled_posterior_means(random_model):
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    vae = random_model.pipeline.vae
    with torch.no_grad():
        expected = vae.encode(pixels / 127.5 - 1).latent_dist.mean * vae.config.scaling_factor
    torch.testing.assert_close(random_model.encode(pixels), expected)


def test_batch_size_changes_latents_by_rounding_only(random_model):
    pixels = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    one_by_one = torch.cat([random_model.encode(image[None]) for image in pixels])
    torch.testing.assert_close(random_model.encode(pixels), one_by_one, atol=1e-5, rtol=1e-5)

    together = random_model.denoise(LATENTS, PROMPTS, generators(), num_inference_steps=5)
    apart = [
        random_model.denoise(LATENTS[i : i + 1], PROMPTS[i : i + 1], generators()[i : i + 1], num_inference_steps=5)
        for i in range(4)
    ]
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-3, rtol=1e-3)


def test_a_trained_vae_gives_an_image_back(embedded):
    images = Digits().test()
    pixels = torch.stack([torch.tensor(list(images[i][0].convert("RGB").tobytes())) for i in range(20)])
    pixels = pixels.view(20, 32, 32, 3).permute(0, 3, 1, 2).to(torch.uint8)
    error = (embedded.decode(embedded.encode(pixels)).float() - pixels.float()).square().mean()
    assert 10 * torch.log10(255**2 / error) > 25  # dB


def test_decoded_images_are_resized_on_request(random_model):
    assert random_model.decode(LATENTS).shape == (4, 3, 16, 16)
    resized = random_model.decode(LATENTS, size=12)
    assert resized.shape == (4, 3, 12, 12)
    assert resized.dtype == torch.uint8


def test_a_prompt_is_encoded_once(random_pipeline, monkeypatch):
    model = LatentDiffusion(str(random_pipeline))
    encoded, encode = [], model.encode_prompt
    monkeypatch.setattr(model, "encode_prompt", lambda *prompt: encoded.append(prompt) or encode(*prompt))
    for _ in range(3):
        model.denoise(LATENTS, PROMPTS, generators(), num_inference_steps=2)
    assert encoded == [("0", ""), ("1", ""), ("2", "")]


def test_the_scheduler_can_be_chosen(random_pipeline):
    chosen = LatentDiffusion(str(random_pipeline), scheduler="EulerDiscreteScheduler")
    assert type(chosen.pipeline.scheduler).__name__ == "EulerDiscreteScheduler"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"model": "nonsense"},
            "`diffusion` is 'nonsense': no model of ours (digits, cifar10), no folder or file, and no Hub id",
        ),
        ({"model": "/nowhere/at/all"}, "no folder"),
        ({"model": "owner/unknown"}, "`diffusion` is 'owner/unknown'"),
        ({"model": "."}, "model_index.json"),
        ({"model": "digits", "scheduler": "os"}, "`scheduler` is 'os'"),
    ],
)
def test_an_unknown_model_or_scheduler_is_named(options, says):
    with pytest.raises(InputError) as error:
        LatentDiffusion(**options)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_the_native_resolution_is_the_models(random_model):
    assert random_model.resolution == 16
