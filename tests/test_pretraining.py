import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from d4m_plugin import ImageFolder, InputError, LatentDiffusion, Recipe, distill, latent_training, pretraining
from d4m_plugin.errors import InputWarning
from d4m_plugin.pretraining import byte_tokenizer, pretrain, tokenize
from tests.toys import Squares


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A pipeline trained for a few steps: better than none at reconstruction, no more."""
    folder = tmp_path_factory.mktemp("pretrained") / "squares"
    return pretrain(
        Squares(per_class=30),
        folder,
        vae_channels=(16, 16),
        unet_channels=(32, 32),
        vae_steps=150,
        unet_steps=20,
        batch_size=16,
    )


def files(folder):
    """Every file with its bytes: weights, and configurations, which must not say where they were made."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_product_is_a_stock_pipeline_in_half_precision(pretrained):
    pipeline = StableDiffusionPipeline.from_pretrained(pretrained)
    index = json.loads((pretrained / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert type(pipeline.unet).__name__ == "UNet2DConditionModel"
    weights = list(pretrained.rglob("*.safetensors"))
    assert len(weights) == 3
    assert {tensor.dtype for path in weights for tensor in load_file(path).values()} == {torch.float16}
    assert not list(pretrained.rglob("*.bin"))


def test_who_may_read_one_file_of_the_product_may_read_all(pretrained):
    assert len({path.stat().st_mode for path in pretrained.rglob("*.*") if path.is_file()}) == 1


def test_the_vae_learnt_to_reconstruct(pretrained, random_model):
    def error(model, pixels):
        return (model.decode(model.encode(pixels)).float() - pixels).abs().mean()

    test = Squares().test()
    pixels = torch.from_numpy(test.pixels).permute(0, 3, 1, 2)
    assert error(LatentDiffusion(str(pretrained)), pixels) < 0.7 * error(random_model, pixels)


def test_the_denoiser_learns_the_weighted_velocity_and_a_tenth_without_prompt(pretrained):
    """Against min(SNR, 5) / (SNR + 1) times the error, of a network that predicts none, by the latents it was shown."""
    shown = []

    class Nothing(torch.nn.Module):
        def forward(self, noised, timesteps, prompts):
            shown.append((noised, timesteps, prompts))
            return SimpleNamespace(sample=torch.zeros_like(noised))

    class Itself(torch.nn.Module):
        def forward(self, ids):
            return SimpleNamespace(last_hidden_state=ids[..., None])

    clean = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = StableDiffusionPipeline.from_pretrained(pretrained).scheduler
    parts = SimpleNamespace(unet=Nothing(), text_encoder=Itself(), scheduler=scheduler)
    rows = (clean.expand(3, -1, -1, -1), torch.ones(3, dtype=torch.int64))
    training = latent_training.DenoiserTraining(parts, torch.arange(3)[:, None].expand(3, 77), rows, 4096, 1e-3, 0)
    training.log = lambda *_, **__: None
    loss = training.training_step(0)

    ((noised, timesteps, prompts),) = shown
    share = scheduler.alphas_cumprod[timesteps].double().view(-1, 1, 1, 1)
    noise = (noised - share.sqrt() * clean) / (1 - share).sqrt()
    velocity = share.sqrt() * noise - (1 - share).sqrt() * clean
    snr = share / (1 - share)
    expected = (snr.clamp(max=5) / (snr + 1) * velocity**2).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert timesteps.unique().numel() > 900
    assert set(prompts.unique().tolist()) == {1, 2}  # the class's and the empty one, which is the last
    assert (prompts[:, 0, 0] == 2).double().mean().item() == pytest.approx(0.1, abs=0.02)


def test_latents_have_unit_scale(pretrained):
    """`scaling_factor` makes the training latents' standard deviation 1: what the noise schedule expects."""
    pixels = torch.from_numpy(Squares(per_class=30).train().pixels).permute(0, 3, 1, 2)
    assert LatentDiffusion(str(pretrained)).encode(pixels).std().item() == pytest.approx(1, abs=0.1)


def test_the_product_distils(pretrained):
    recipe = Recipe(diffusion=str(pretrained), ipc=1, num_inference_steps=4)
    assert len(distill(Squares(), recipe)) == 3


def test_a_pipeline_goes_on_learning_with_its_own_vae(pretrained, tmp_path):
    options = {"start_from": str(pretrained), "unet_steps": 20, "batch_size": 16}
    further = pretrain(Squares(per_class=30), tmp_path / "further", **options)
    before, after = files(pretrained), files(further)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    source = Squares(per_class=30)
    source.image_size = 21  # the pipeline's own counts
    assert files(pretrain(source, tmp_path / "again", **options)) == after


def test_what_cannot_go_on_learning_is_named(random_pipeline, pretrained, tmp_path):
    with pytest.raises(InputError, match=r"`start_from` is .*random', which is no pipeline of `d4m pretrain`"):
        pretrain(Squares(), tmp_path / "new", start_from=str(random_pipeline))
    with pytest.raises(InputError, match="of 16 pixels, and `image_size` 32; use its own"):
        pretrain(Squares(), tmp_path / "new", start_from=str(pretrained), image_size=32)
    assert not list(tmp_path.iterdir())


def test_the_same_command_gives_the_same_pipeline(tmp_path):
    options = {"vae_channels": (16, 16), "unet_channels": (32, 64), "vae_steps": 2, "unet_steps": 10, "batch_size": 16}
    first, second = (pretrain(Squares(), tmp_path / name, **options) for name in ("first", "second"))
    assert files(first) == files(second)


def test_a_run_that_was_killed_goes_on_and_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(latent_training, "STEPS_A_CHECKPOINT", 10)
    options = {"vae_channels": (16, 16), "unet_channels": (32, 32), "vae_steps": 25, "unet_steps": 40, "batch_size": 4}
    whole = pretrain(Squares(), tmp_path / "whole", **options)
    draw, made = latent_training.Training.draw, []

    def killed_at(step):
        def draws(self):
            if len(made) == step:
                raise InterruptedError
            made.append(type(self).__name__)
            return draw(self)

        return draws

    def full(*_):
        raise OSError("No space left on device")

    for step in (13, 50):  # in the VAE's second ten, and in the U-Net's third ten
        monkeypatch.setattr(latent_training.Training, "draw", killed_at(step))
        with pytest.raises(InterruptedError):
            pretrain(Squares(), tmp_path / "killed", **options)
        assert not (tmp_path / "killed").exists()
    monkeypatch.setattr(latent_training.Training, "draw", killed_at(None))
    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusionPipeline, "save_pretrained", full)
        with pytest.raises(OSError, match="No space"):  # after the last step
            pretrain(Squares(), tmp_path / "killed", **options)
    resumed = pretrain(Squares(), tmp_path / "killed", **options)
    assert len(made) == 25 + 3 + 40 + 2 + 10  # what came after the last checkpoint is made twice
    assert not (tmp_path / "killed.partial").exists()
    assert files(whole) == files(resumed)


def test_a_run_goes_on_whatever_lies_in_the_working_folder(tmp_path, monkeypatch):
    """Its own unfinished work lies there by default."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(latent_training, "STEPS_A_CHECKPOINT", 2)
    options = {"vae_channels": (16, 16), "unet_channels": (32, 32), "vae_steps": 4, "unet_steps": 2, "batch_size": 4}
    draw, made = latent_training.Training.draw, []

    def draws(self):
        if len(made) == 3:
            raise InterruptedError
        made.append(self)
        return draw(self)

    with monkeypatch.context() as patch:
        patch.setattr(latent_training.Training, "draw", draws)
        with pytest.raises(InterruptedError):
            pretrain(Squares(), Path("made"), **options)
    (work,) = Path("made.partial").iterdir()
    assert (work / "vae.ckpt").exists()
    Path("another file").touch()
    found = []
    monkeypatch.setattr(pretraining, "train", lambda *arguments: found.append(arguments[3]))  # the checkpoint
    pretrain(Squares(), Path("made"), **options)
    assert found[0] == work / "vae.ckpt"


def test_compiled_parts_keep_their_names_and_results(tmp_path, monkeypatch):
    """`compile` wraps the calls only; a compiler is not needed here."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    options = {"vae_channels": (16, 16), "unet_channels": (32, 32), "vae_steps": 2, "unet_steps": 2, "batch_size": 4}
    made = [pretrain(Squares(), tmp_path / str(compile), compile=compile, **options) for compile in (False, True)]
    assert compiled == ["Encoder", "Decoder", "UNet2DConditionModel"]
    assert files(made[0]) == files(made[1])


def test_any_class_name_is_told_from_any_other():
    names = ["crane", "Ünïcode", "鶴", "🦆", "🐓", "a/b", '"quoted", with commas', "a", "A", ""]
    tokenizer = byte_tokenizer()
    ids = tokenize(tokenizer, names)
    assert ids.shape == (10, 77)
    assert len({tuple(row.tolist()) for row in ids}) == 10
    for name, row in zip(names, ids.tolist(), strict=True):
        read = row[1 : row.index(tokenizer.eos_token_id)]
        assert len(read) == len(name.replace(" ", "").encode())  # a token a byte, none unknown


def test_a_name_longer_than_the_encoder_reads_is_cut():
    assert tokenize(byte_tokenizer(), ["x" * 200]).shape == (1, 77)


def test_an_output_that_exists_is_named_before_any_work(tmp_path):
    with pytest.raises(InputError, match=r"`output` is .* which exists"):
        pretrain(Squares(), tmp_path)


def test_an_image_size_that_cannot_be_halved_is_named(tmp_path):
    with pytest.raises(InputError, match=r"`image_size` is 18.* multiple of 8"):
        pretrain(Squares(), tmp_path / "new", image_size=18)


@pytest.mark.parametrize(
    "options",
    [{"vae_channels": (10,)}, {"unet_channels": ()}, {"unet_steps": 0}, {"image_size": -8}, {"seed": -1}],
    ids=str,
)
def test_sizes_that_cannot_work_are_named(tmp_path, options):
    with pytest.raises(InputError, match=f"`{next(iter(options))}` is"):
        pretrain(Squares(), tmp_path / "new", **options)


SMALL = {"vae_channels": (16, 16), "unet_channels": (32, 32), "vae_steps": 1, "unet_steps": 1, "batch_size": 2}


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_labels_may_be_of_any_whole_type(tmp_path, kind):
    class Short(Squares):
        def train(self):
            images = super().train()
            images.targets = np.asarray(images.targets, kind)
            return images

    made = [pretrain(source(), tmp_path / source.__name__, **SMALL) for source in (Squares, Short)]
    assert files(made[0]) == files(made[1])


def test_labels_that_are_none_are_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "train", lambda *_: pytest.fail("work began"))
    source = Squares()
    source.classes = ("red", "green")
    source.train = Squares().train
    with pytest.raises(InputError, match=r"the `targets` of squares must be a whole number .* below 2"):
        pretrain(source, tmp_path / "model", **SMALL)
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_read_are_told_before_the_work_or_left_out(tmp_path, monkeypatch):
    for label, (name, level) in enumerate((name, level) for name in ("cat", "dog") for level in range(8)):
        (tmp_path / "pets" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (9 * label, level, 0)).save(tmp_path / "pets" / name / f"{level}.png")
    source = ImageFolder(tmp_path / "pets", test_share=0.1)
    bad = [tmp_path / "pets" / name.decode() for name in source.train().names.to_pylist()[:2]]
    for path in bad:
        path.write_bytes(b"no image")
    with pytest.raises(
        InputError, match=r"2 of 14 training images of pets cannot be read\. .* `skip_bad_images` to true"
    ):
        pretrain(source, tmp_path / "model", num_workers=1, cache_dir=tmp_path / "cache", **SMALL)
    assert {path.name for path in tmp_path.iterdir()} == {"pets", "cache"}
    with pytest.warns(InputWarning, match="2 of 14 training images cannot be read and are left out"):
        skipping = pretrain(source, tmp_path / "model", skip_bad_images=True, cache_dir=tmp_path / "cache", **SMALL)
    assert (skipping / "model_index.json").is_file()


def test_it_is_trained_by_one_process_of_many(tmp_path, monkeypatch):
    told = {"NTASKS": "2", "NTASKS_PER_NODE": "2", "NNODES": "1", "NODEID": "0", "PROCID": "0", "LOCALID": "0"}
    for name, value in told.items():
        monkeypatch.setenv(f"SLURM_{name}", value)  # Lightning would wait for the other
    assert (pretrain(Squares(), tmp_path / "model", **SMALL) / "model_index.json").is_file()


def test_a_training_that_diverges_is_told_and_gives_no_pipeline(tmp_path):
    with pytest.raises(InputError, match=r"the training diverged, .*; lower `vae_lr` or `unet_lr`"):
        pretrain(Squares(), tmp_path / "model", **SMALL | {"vae_steps": 20, "vae_lr": 1e12})
    assert not (tmp_path / "model").exists()


def test_a_run_leaves_other_runs_to_the_same_place_alone(tmp_path):
    other = tmp_path / "model.partial" / "0123456789ab" / "vae.ckpt"
    other.parent.mkdir(parents=True)
    other.touch()
    pretrain(Squares(), tmp_path / "model", **SMALL)
    assert [path.name for path in (tmp_path / "model.partial").iterdir()] == ["0123456789ab"]
    assert other.exists()


@pytest.mark.parametrize("damaged", ["vae.safetensors", "unet.ckpt"])
def test_damaged_work_is_told_and_done_again(tmp_path, monkeypatch, damaged):
    monkeypatch.setattr(latent_training, "STEPS_A_CHECKPOINT", 1)
    options = SMALL | {"unet_steps": 3}
    whole = pretrain(Squares(), tmp_path / "whole", **options)

    def full(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusionPipeline, "save_pretrained", full)
        with pytest.raises(OSError, match="No space"):
            pretrain(Squares(), tmp_path / "made", **options)
    (file,) = (tmp_path / "made.partial").glob(f"*/{damaged}")
    content = file.read_bytes()
    middle = len(content) // 2
    file.write_bytes(
        content[:middle] + bytes(100) + content[middle + 100 :] if damaged.startswith("vae") else content[:middle]
    )
    with pytest.warns(InputWarning, match=f"{damaged}' is damaged"):
        assert files(pretrain(Squares(), tmp_path / "made", **options)) == files(whole)


def test_of_two_commands_for_one_output_one_trains_and_the_other_takes_it(tmp_path, monkeypatch):
    train, began, trained = pretraining.train, threading.Event(), []

    def slow(*arguments):
        trained.append(arguments)
        began.set()
        time.sleep(0.2)
        train(*arguments)

    monkeypatch.setattr(pretraining, "train", slow)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(pretrain, Squares(), tmp_path / "made", **SMALL)
        began.wait()
        assert pretrain(Squares(), tmp_path / "made", **SMALL) == first.result() == tmp_path / "made"
    assert len(trained) == 2  # VAE and U-Net
    assert {path.name for path in tmp_path.iterdir()} == {"made", ".made.lock"}


def test_a_command_of_other_options_does_not_take_what_was_made_meanwhile(tmp_path, monkeypatch):
    @contextmanager
    def meanwhile(*_):
        (tmp_path / "made").mkdir()
        yield

    monkeypatch.setattr(pretraining, "in_turn", meanwhile)
    with pytest.raises(InputError, match=r"`output` is .*made', which exists"):
        pretrain(Squares(), tmp_path / "made", **SMALL)
