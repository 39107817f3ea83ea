"""Every family of diffusion models: what we compute in batches is what its stock pipeline gives, image by image."""

import diffusers
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, StableDiffusionPipeline
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file

import d4m_plugin.diffusion as diffusion
import d4m_plugin.rehearsal as rehearsal
from d4m_plugin import InputError, LatentDiffusion, Recipe
from d4m_plugin.diffusion import _make_scheduler
from d4m_plugin.seeding import generator_of
from d4m_plugin.synthesis import check_denoising, open_model
from tests import families
from tests.toys import Squares

PROMPTS = ["a cat", "a dog", "a cat"]
SCHEDULERS = [
    "PNDMScheduler",
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "LCMScheduler",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def make(family):
        if family not in made:
            made[family] = families.save(family, tmp_path_factory.mktemp(family))
        return str(made[family])

    return make


def by_the_stock_pipeline(folder, latents, scheduler=None, **options):
    stock = AutoPipelineForImage2Image.from_pretrained(folder, safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    if scheduler:
        stock.scheduler = LatentDiffusion(folder, scheduler=scheduler).pipeline.scheduler
    if "flux" in type(stock).__name__.lower() or "3" in type(stock).__name__:
        options |= {"height": 16, "width": 16}
    return torch.cat(
        [
            stock(
                prompt=prompt, image=start[None], generator=generator_of(1, index), output_type="pt", **options
            ).images
            for index, (prompt, start) in enumerate(zip(PROMPTS, latents, strict=True))
        ]
    )


def in_batches(model, latents, **options):
    generators = [generator_of(1, index) for index in range(len(PROMPTS))]
    return model.decode(model.denoise(latents, PROMPTS, generators, **options)) / 255


def starts(model):
    channels = model.pipeline.vae.config.latent_channels
    return torch.randn(len(PROMPTS), channels, 8, 8, generator=generator_of(0))


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_batch_equals_the_stock_pipeline_called_once_an_image(folder, family, guidance_scale):
    model = LatentDiffusion(folder(family), dtype=torch.float32)
    options = {"guidance_scale": guidance_scale, "num_inference_steps": 4, "strength": 0.75}
    expected = by_the_stock_pipeline(folder(family), starts(model), **options)
    assert (in_batches(model, starts(model), **options) - expected).abs().max() < 1.01 / 255


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_with_every_scheduler_too(folder, family, scheduler):
    model = LatentDiffusion(folder(family), scheduler=scheduler, dtype=torch.float32)
    options = {"guidance_scale": 5.0, "num_inference_steps": 6, "strength": 0.7}
    expected = by_the_stock_pipeline(folder(family), starts(model), scheduler, **options)
    assert (in_batches(model, starts(model), **options) - expected).abs().max() < 1.01 / 255


@pytest.mark.parametrize(
    ("family", "scheduler"), [*((family, None) for family in families.FAMILIES), *(("sd", each) for each in SCHEDULERS)]
)
def test_mode_guidance_pulls_back_to_the_start(folder, family, scheduler):
    model = LatentDiffusion(folder(family), scheduler=scheduler, dtype=torch.float32)
    options = {"strength": 1.0, "num_inference_steps": 8, "mode_guidance_stop": 1.0}

    def distance(scale):
        generators = [generator_of(1, index) for index in range(len(PROMPTS))]
        found = model.denoise(starts(model), PROMPTS, generators, mode_guidance_scale=scale, **options)
        return float((found - starts(model)).norm())

    assert distance(0.5) < distance(0.1) < distance(0.0)


@pytest.mark.parametrize(("family", "steps", "strength"), [("sd", 4, 0.7), ("sdxl", 20, 0.52)])
def test_mode_guidance_that_would_pull_no_step_is_refused(folder, family, steps, strength):
    """As the pipelines round the steps that they leave out down, and more than the share of the schedule."""
    model = LatentDiffusion(folder(family), dtype=torch.float32)
    options = {"strength": strength, "num_inference_steps": steps, "mode_guidance_scale": 0.1}
    with pytest.raises(InputError, match=r"no step before a `mode_guidance_stop` of 0\.5, so that none is pulled"):
        in_batches(model, starts(model), **options)
    in_batches(model, starts(model), **options | {"mode_guidance_stop": 0.8})


@pytest.mark.parametrize("family", families.FAMILIES)
def test_latents_are_those_that_the_pipeline_makes_of_an_image(folder, family):
    """With the shift and scale of its VAE's configuration."""
    model = LatentDiffusion(folder(family), dtype=torch.float32)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=generator_of(2))
    vae = model.pipeline.vae
    with torch.no_grad():
        mean = vae.encode(pixels / 127.5 - 1).latent_dist.mean
    expected = (mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    torch.testing.assert_close(model.encode(pixels), expected)
    assert expected.shape[1:] == model.latent_shape(16)
    with torch.no_grad():
        back = vae.decode(mean).sample
    torch.testing.assert_close(
        model.decode(model.encode(pixels)).float(), ((back + 1) * 127.5).clamp(0, 255), atol=0.51, rtol=0
    )


def test_an_sdxl_vae_may_have_a_mean_and_a_deviation_by_channel(folder):
    model = LatentDiffusion(folder("sdxl"), dtype=torch.float32)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=generator_of(2))
    plain, back = model.encode(pixels), model.decode(model.encode(pixels))
    mean, std = [0.1, 0.2, -0.3, 0.0], [1.0, 2.0, 0.5, 4.0]
    model.pipeline.vae.register_to_config(latents_mean=mean, latents_std=std)
    scale = model.pipeline.vae.config.scaling_factor
    by_channel = [torch.tensor(each).view(1, 4, 1, 1) for each in (mean, std)]
    torch.testing.assert_close(model.encode(pixels), (plain / scale - by_channel[0]) * scale / by_channel[1])
    assert (model.decode(model.encode(pixels)).int() - back.int()).abs().max() <= 1


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_resolution_is_the_models(folder, family):
    expected = 256 if family == "flux" else 16  # of FLUX, the pipeline's: 128 latents
    assert LatentDiffusion(folder(family)).resolution == expected


@pytest.mark.parametrize(
    ("family", "scheduler"),
    [("sd3", "DDIMScheduler"), ("flux", "PNDMScheduler"), ("sd", "FlowMatchEulerDiscreteScheduler")],
)
def test_a_scheduler_of_another_kind_is_refused(folder, family, scheduler):
    with pytest.raises(InputError, match=f"`scheduler` is '{scheduler}', which is not of the kind of the model's own"):
        LatentDiffusion(folder(family), scheduler=scheduler)


def test_steps_that_a_schedule_has_not_are_refused(folder):
    lcm = LatentDiffusion(folder("lcm"))
    lcm.check_steps(35, 0.7)
    with pytest.raises(
        InputError, match=r"`num_inference_steps` is 50, which LCMScheduler cannot make at `strength` 0\.7"
    ):
        lcm.check_steps(50, 0.7)
    with pytest.raises(InputError, match="`num_inference_steps` is 3, which PNDMScheduler cannot make"):
        LatentDiffusion(folder("sd"), scheduler="PNDMScheduler").check_steps(3, 0.7)
    with pytest.raises(InputError, match="`num_inference_steps` is 1001; the model's schedule has 1000 steps"):
        LatentDiffusion(folder("sd")).check_steps(1001, 0.7)


@pytest.mark.parametrize(("steps", "strength"), [(10, 0.75), (28, 0.7), (4, 0.7), (8, 1.0)])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_steps_that_are_told_are_those_that_are_made(folder, family, steps, strength):
    model, made = LatentDiffusion(folder(family)), []
    model._denoiser.register_forward_hook(lambda *_: made.append(1))
    options = {"num_inference_steps": steps, "strength": strength, "guidance_scale": 1.0}
    model.denoise(starts(model)[:1], ["a cat"], [generator_of(0)], **options)
    assert len(made) == model.steps_of(steps, strength)


@pytest.mark.parametrize(
    ("family", "scheduler", "guidance_scale"),
    [
        *((family, None, 8.0) for family in families.FAMILIES),
        ("sd", "HeunDiscreteScheduler", 1.0),
        ("sd", "HeunDiscreteScheduler", 8.0),
        ("sd", "PNDMScheduler", 8.0),
    ],
)
def test_a_trial_counts_the_passes_that_are_made(folder, family, scheduler, guidance_scale):
    options = {"num_inference_steps": 20, "guidance_scale": guidance_scale, "strength": 0.7}
    recipe = Recipe(diffusion=folder(family), scheduler=scheduler, **options).resolved(Squares())
    model, made = open_model(recipe), []
    told = check_denoising(recipe, model, "a cat", 16)
    model._denoiser.register_forward_hook(lambda denoiser, given, output: made.append(len(output[0])))
    model.denoise(starts(model)[:1], ["a cat"], [generator_of(0)], **options)
    assert told == sum(made)


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "DDIMScheduler", "HeunDiscreteScheduler"])
def test_a_dry_run_times_the_passes_that_are_made(folder, scheduler, monkeypatch):
    recipe = Recipe(diffusion=folder("sd"), scheduler=scheduler, num_inference_steps=20).resolved(Squares())
    model, passes = open_model(recipe), []
    model.pipeline.unet.register_forward_hook(lambda *_: passes.append(1))

    def counted(work):
        passes.clear()
        work()
        return len(passes)

    monkeypatch.setattr(rehearsal, "_seconds", counted)
    step, once = rehearsal._denoising(model, starts(model)[:1], "a cat", recipe)
    made = counted(lambda: model.denoise(starts(model)[:1], ["a cat"], [generator_of(0)], num_inference_steps=20))
    assert model.steps_of(20, recipe.strength) * step + once == pytest.approx(made, abs=1)


def test_a_dry_run_makes_do_with_the_memory_that_there_is(folder, monkeypatch):
    recipe, tried = Recipe(diffusion=folder("sd")).resolved(Squares()), []
    model, denoise, decode = open_model(recipe), LatentDiffusion.denoise, LatentDiffusion._decode

    def for_two(self, latents, *args, **options):
        tried.append(len(latents))
        if len(latents) > 2:
            raise torch.OutOfMemoryError
        return denoise(self, latents, *args, **options)

    def for_one(self, latents, size):
        if len(latents) > 1:
            raise torch.OutOfMemoryError
        return decode(self, latents, size)

    monkeypatch.setattr(LatentDiffusion, "denoise", for_two)
    monkeypatch.setattr(LatentDiffusion, "_decode", for_one)
    step, _ = rehearsal._denoising(model, torch.cat([starts(model)] * 2), "a cat", recipe)
    assert step > 0
    assert tried == [6, 3, *[2] * 9]


@pytest.mark.parametrize(
    ("family", "scheduler"),
    [
        *(
            ("sd", kind)
            for kind in ("IPNDMScheduler", "DDIMInverseScheduler", "RePaintScheduler", "ScoreSdeVeScheduler")
        ),
        *(("sd", kind) for kind in ("CogVideoXDPMScheduler", "DDPMWuerstchenScheduler")),
        ("flux", "FlowMatchHeunDiscreteScheduler"),
    ],
)
def test_a_scheduler_that_the_pipeline_cannot_use_is_refused(folder, family, scheduler):
    recipe = Recipe(diffusion=folder(family), scheduler=scheduler).resolved(Squares())
    says = (
        f"`diffusion` is '.*' and `scheduler` '{scheduler}', with which .*Img2ImgPipeline makes no images \\(.+\\)\\.$"
    )
    with pytest.raises(InputError, match=says):
        check_denoising(recipe, open_model(recipe), "a cat", 16)


@pytest.mark.parametrize(
    ("pipeline", "says"),
    [
        (lambda: families._of_stable_diffusion(in_channels=9), "StableDiffusionImg2ImgPipeline makes no images"),
        (
            lambda: diffusers.FluxKontextPipeline(**families.flux().components),
            "FluxKontextPipeline makes no images .*strength",
        ),
    ],
    ids=["inpainting", "no strength"],
)
def test_a_pipeline_that_makes_no_images_of_latents_is_refused(tmp_path, pipeline, says):
    pipeline().save_pretrained(tmp_path)
    recipe = Recipe(diffusion=str(tmp_path)).resolved(Squares())
    with pytest.raises(InputError, match=says):
        check_denoising(recipe, open_model(recipe), "a cat", 16)


@pytest.mark.parametrize("compile", [False, True])
def test_a_trial_is_one_pass_that_compiles_nothing_and_draws_nothing(folder, compile):
    recipe, passes = Recipe(diffusion=folder("sd")).resolved(Squares()), []
    model = open_model(recipe, compile)
    model.pipeline.unet.conv_in.register_forward_hook(lambda *_: passes.append(1))
    torch.manual_seed(0)
    check_denoising(recipe, model, "a cat", 16)
    assert len(passes) == 1
    assert bool(model.pipeline.unet._compiled_call_impl) == compile
    assert torch.equal(torch.get_rng_state(), torch.manual_seed(0).get_state())


def test_a_flow_by_another_scheduler_is_denoised(folder):
    model = open_model(Recipe(diffusion=folder("sd3"), scheduler="FlowMatchHeunDiscreteScheduler").resolved(Squares()))
    latents = model.denoise(starts(model)[:1], ["a cat"], [generator_of(0)], num_inference_steps=4)
    assert latents.isfinite().all()


@pytest.mark.parametrize("mode_guidance_scale", [0.0, 0.1])
@pytest.mark.parametrize(
    ("family", "scheduler", "options"),
    [
        ("flux", "FlowMatchLCMScheduler", {}),
        ("sd3", None, {"stochastic_sampling": True}),
        ("sd", "EulerAncestralDiscreteScheduler", {}),
    ],
)
def test_the_generators_decide_all_noise(folder, family, scheduler, options, mode_guidance_scale):
    model = LatentDiffusion(folder(family), scheduler=scheduler, scheduler_options=options, dtype=torch.float32)

    def denoised(seed, some=slice(3)):
        torch.manual_seed(seed)
        generators = [generator_of(1, index) for index in range(3)]
        options = {"strength": 1.0, "num_inference_steps": 4, "mode_guidance_scale": mode_guidance_scale}
        return model.denoise(starts(model)[some], PROMPTS[some], generators[some], **options)

    assert torch.equal(denoised(1), denoised(2))
    torch.testing.assert_close(denoised(1)[1:2], denoised(1, slice(1, 2)), atol=1e-3, rtol=1e-3)


def test_the_scheduler_is_as_it_was_after_an_error(folder):
    model = LatentDiffusion(folder("sd"))
    with pytest.raises(ValueError, match="strength"):
        model.denoise(starts(model), PROMPTS, [generator_of(0)] * 3, strength=2.0, mode_guidance_scale=0.1)
    assert "step" not in vars(model.pipeline.scheduler)


def test_a_scheduler_with_noise_of_its_own_is_refused(folder, monkeypatch):
    class DPMSolverSDEScheduler(diffusers.EulerDiscreteScheduler):  # whose package is no dependency
        @register_to_config
        def __init__(self, beta_schedule="linear", noise_sampler_seed=None):
            super().__init__(beta_schedule=beta_schedule)
            self.register_to_config(noise_sampler_seed=noise_sampler_seed)

    monkeypatch.setattr(diffusers, "DPMSolverSDEScheduler", DPMSolverSDEScheduler)
    with pytest.raises(InputError, match="`scheduler` is 'DPMSolverSDEScheduler', whose noise `seed` does not decide"):
        open_model(Recipe(diffusion=folder("sd"), scheduler="DPMSolverSDEScheduler").resolved(Squares()))


def test_a_scheduler_whose_package_is_missing_is_refused(folder, monkeypatch):
    class Missing(type):
        def __getattr__(cls, name):
            raise ImportError("\nDPMSolverSDEScheduler requires the torchsde library")

    class StandIn(metaclass=Missing):
        pass

    monkeypatch.setattr(diffusers, "DPMSolverSDEScheduler", StandIn)
    with pytest.raises(InputError, match="`scheduler` is 'DPMSolverSDEScheduler': DPMSolverSDEScheduler requires the"):
        LatentDiffusion(folder("sd"), scheduler="DPMSolverSDEScheduler")


@pytest.mark.parametrize(("family", "step"), [("sd", 2), ("sd3", 2), ("flux", 4)])
def test_a_resolution_that_the_latents_cannot_have_is_refused(folder, family, step):
    model = LatentDiffusion(folder(family), dtype=torch.float32)
    assert model.check_resolution(None) == model.resolution
    assert model.check_resolution(3 * step) == 3 * step
    with pytest.raises(InputError, match=f"`resolution` is {3 * step + 1}; .* takes multiples of {step}"):
        model.check_resolution(3 * step + 1)


def test_a_schedulers_options_are_taken_or_refused(folder):
    chosen = LatentDiffusion(
        folder("sd"), scheduler="DPMSolverMultistepScheduler", scheduler_options={"use_karras_sigmas": True}
    )
    assert chosen.pipeline.scheduler.config.use_karras_sigmas
    with pytest.raises(InputError, match="`scheduler_options` has 'karras', which DDIMScheduler does not take"):
        LatentDiffusion(folder("sd"), scheduler_options={"karras": True})


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler"])
def test_latents_are_not_cut_to_the_range_of_pixels_unless_asked(scheduler):
    own = diffusers.PNDMScheduler()  # whose configuration has no such option
    assert not _make_scheduler(own, scheduler, {}).config.clip_sample
    assert _make_scheduler(own, scheduler, {"clip_sample": True}).config.clip_sample


def test_a_vae_of_the_same_latents_may_take_the_models_place(folder, tmp_path):
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    tiny.save_pretrained(tmp_path / "tiny")
    model = LatentDiffusion(folder("sd"), vae=str(tmp_path / "tiny"), dtype=torch.float32)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=generator_of(2))
    with torch.no_grad():
        expected = tiny.encode(pixels / 127.5 - 1).latents * tiny.config.scaling_factor
    torch.testing.assert_close(model.encode(pixels), expected)
    assert model.decode(model.encode(pixels)).shape == pixels.shape
    with pytest.raises(InputError, match=r"`vae` is .*, of 4 latent channels; the model's has 16"):
        LatentDiffusion(folder("sd3"), vae=str(tmp_path / "tiny"))
    with pytest.raises(InputError, match="`vae` is '/nowhere', which is no loadable VAE"):
        LatentDiffusion(folder("sd"), vae="/nowhere")


@pytest.mark.parametrize("family", families.FAMILIES)
def test_only_what_a_stage_needs_is_on_the_device(folder, family, monkeypatch):
    """The device is the CPU by another name here, so that going there can be told from going back."""
    device = torch.device("cpu:0")
    there, seen, together = set(), [], []
    move = torch.nn.Module.to

    def spy(module, *args, **kwargs):
        if args and args[0] == device and isinstance(args[0], torch.device):
            there.add(module)
            together.append(there.copy())
        elif args == ("cpu",):
            there.discard(module)
        return move(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "to", spy)
    model = LatentDiffusion(folder(family), device=device, dtype=torch.float32)
    parts = {part: name for name, part in model.pipeline.components.items() if isinstance(part, torch.nn.Module)}

    def names(on_it=there):
        return {parts[part].split("_encoder")[0] for part in on_it}

    for part in parts:
        if parts[part] != "vae":
            part.register_forward_pre_hook(lambda part, _: seen.append((parts[part].split("_encoder")[0], names())))
    pixels = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    latents = model.encode(pixels)
    assert names() == {"vae"}
    for prompt in ("a cat", "a dog"):
        model.decode(model.denoise(latents, [prompt], [generator_of(0)], num_inference_steps=2))
    with model.answering_once():
        model.denoise(latents, ["a cow"], [generator_of(0)], num_inference_steps=2)
    assert names() == {"vae"}
    denoiser = "transformer" if family in ("sd3", "flux") else "unet"
    assert {name for name, _ in seen} == {"text", denoiser}
    assert all(on_it == {"vae", name} for name, on_it in seen)
    assert all(names(on_it) <= {"vae", "text"} or names(on_it) == {"vae", denoiser} for on_it in together)


def test_parts_stay_on_a_device_that_has_room_for_all(folder, monkeypatch):
    left, move = [], torch.nn.Module.to
    model = LatentDiffusion(folder("sd"), device=torch.device("cpu:0"), dtype=torch.float32)
    monkeypatch.setattr(
        torch.nn.Module, "to", lambda part, *to: left.append(part) if to == ("cpu",) else move(part, *to)
    )
    monkeypatch.setattr(diffusion, "_memory_of", lambda _: 2**30)
    for prompt in PROMPTS:
        model.denoise(starts(model)[:1], [prompt], [generator_of(0)], num_inference_steps=2)
    assert not left
    monkeypatch.setattr(diffusion, "_memory_of", lambda _: 2**10)
    model.encode_prompt("a cat", "")
    assert model.pipeline.unet in left


@pytest.mark.parametrize("family", families.FAMILIES)
def test_half_weights_are_used_as_they_are_and_whole_ones_in_half_passes(folder, family):
    """As stock pipelines use them: autocast would bring each norm to float32 and back."""
    cast = set()
    images = {}
    for kind in ("whole", "half"):
        model = LatentDiffusion(folder(family), dtype=torch.bfloat16)
        if kind == "half":
            model.pipeline.to(torch.bfloat16)  # as an accelerator has them
        for part in (*model.modules, model.pipeline.vae.encoder, model.pipeline.vae.decoder):
            part.register_forward_pre_hook(lambda *_, kind=kind: cast.add((kind, torch.is_autocast_enabled("cpu"))))
        images[kind] = in_batches(model, starts(model), guidance_scale=5.0, num_inference_steps=6)
        model.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    assert cast == {("whole", True), ("half", False)}
    assert (images["whole"] - images["half"]).abs().mean() < 2 / 255


@pytest.fixture
def half(folder):
    """SD3 in float16 as an accelerator holds it, with a weight in T5 that overflows there and that T5 keeps whole."""
    model = LatentDiffusion(folder("sd3"), dtype=torch.float16)
    model.pipeline = AutoPipelineForImage2Image.from_pretrained(folder("sd3"), dtype=torch.float16)
    weight = model.pipeline.text_encoder_3.encoder.block[0].layer[1].DenseReluDense.wo.weight
    assert weight.dtype == torch.float32
    with torch.no_grad():
        weight[0, 0] = 1e5
    return model


def test_text_is_encoded_in_the_precision_that_each_weight_is_kept_in(half):
    with torch.inference_mode():
        expected = half.pipeline.encode_prompt("a cat", None, None, do_classifier_free_guidance=True, device="cpu")
    found = half.encode_prompt("a cat", "")
    assert found["prompt_embeds"].isfinite().all()
    assert all(torch.equal(*pair) for pair in zip(found.values(), expected, strict=True))


def test_each_weight_is_as_it_was_after_full_precision(half):
    def weights():
        return [each.clone() for part in half.modules for each in (*part.parameters(), *part.buffers())]

    before = weights()
    with half.full_precision():
        assert {each.dtype for each in weights() if each.is_floating_point()} == {torch.float32}
    for now, then in zip(weights(), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)


def test_large_images_are_decoded_a_few_at_a_time_with_the_same_result(folder, monkeypatch):
    model = LatentDiffusion(folder("sd"), dtype=torch.float32)
    together = model.decode(starts(model))
    monkeypatch.setattr("d4m_plugin.diffusion.DECODED_AT_ONCE", 16 * 16)
    assert torch.equal(model.decode(starts(model)), together)


def test_the_vae_works_in_tiles_where_memory_does_not_hold_one_image(folder, monkeypatch):
    model = LatentDiffusion(folder("sd"), dtype=torch.float32)
    vae = model.pipeline.vae
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=generator_of(2))
    whole = model.encode(pixels)

    def too_small_for(work):
        def run(batch, *args, **kwargs):
            if len(batch) > 1 or not vae.use_tiling:
                raise torch.OutOfMemoryError
            return work(batch, *args, **kwargs)

        return run

    monkeypatch.setattr(vae, "encode", too_small_for(vae.encode))
    monkeypatch.setattr(vae, "decode", too_small_for(vae.decode))
    with pytest.raises(torch.OutOfMemoryError):
        model.encode(pixels)  # of two images, one is tried next
    assert not vae.use_tiling
    tiled = torch.cat([model.encode(image[None]) for image in pixels])
    assert (vae.use_tiling, tiled.shape) == (True, whole.shape)
    assert model.decode(tiled[:1]).shape == (1, 3, 32, 32)


def test_a_compiled_denoiser_computes_the_same(folder, monkeypatch):
    """What is captured of it; the code that a compiler makes of that takes long, and is the compiler's matter."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile(self, backend="eager"))
    plain, compiled = (LatentDiffusion(folder("sd"), dtype=torch.float32, compile=each) for each in (False, True))
    assert compiled._denoiser._compiled_call_impl is not None
    options = {"num_inference_steps": 3, "guidance_scale": 5.0}
    difference = in_batches(compiled, starts(plain), **options) - in_batches(plain, starts(plain), **options)
    assert difference.abs().max() < 1.01 / 255


@pytest.fixture
def one_file(folder, tmp_path, monkeypatch):
    """Stable Diffusion's weights in one file, and a folder in place of the Hub's with the model's configuration."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder("sd"), safety_checker=None)
    save_file(families.in_one_file(pipeline), tmp_path / "model.safetensors")
    known = single_file_utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS
    monkeypatch.setitem(known, "v1", {"pretrained_model_name_or_path": folder("sd")})
    return tmp_path / "model.safetensors"


def test_a_model_may_be_one_file_of_weights(folder, one_file):
    model = LatentDiffusion(str(one_file), dtype=torch.float32)
    expected = LatentDiffusion(folder("sd"), dtype=torch.float32)
    options = {"num_inference_steps": 3, "guidance_scale": 5.0}
    assert torch.equal(in_batches(model, starts(model), **options), in_batches(expected, starts(model), **options))
    assert getattr(model.pipeline, "safety_checker", None) is None


def test_a_file_that_is_no_whole_model_is_refused(one_file):
    weights = load_file(one_file)
    save_file({name: part for name, part in weights.items() if "cond_stage" not in name}, one_file)
    with pytest.raises(InputError, match=r"`diffusion` is '.*model.safetensors', which is no loadable .*CLIPText"):
        LatentDiffusion(str(one_file))
    one_file.write_bytes(b"no weights")
    with pytest.raises(InputError, match=r"`diffusion` is '.*model.safetensors', which is no loadable"):
        LatentDiffusion(str(one_file))
    pickled = one_file.with_suffix(".ckpt")
    pickled.write_bytes(b"")
    with pytest.raises(InputError, match=r"model.ckpt'; a file must be a .safetensors"):
        LatentDiffusion(str(pickled))


def test_a_negative_prompt_that_a_model_does_not_take_is_refused(folder):
    model = LatentDiffusion(folder("flux"))
    with pytest.raises(InputError, match="`negative_prompt` is 'blur', but FluxImg2ImgPipeline takes none"):
        model.encode_prompt("a cat", "blur")
    with pytest.raises(InputError, match="but LatentConsistencyModelImg2ImgPipeline takes none"):
        LatentDiffusion(folder("lcm")).encode_prompt("a cat", "blur")  # which can embed one, and not use it
