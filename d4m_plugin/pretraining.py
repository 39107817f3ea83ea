"""Train a small latent diffusion pipeline on a source: how the embedded models are made.

For images that no public diffusion model knows. The product is a stock `StableDiffusionPipeline` folder, so
everything after it takes the same road as with Stable Diffusion: a VAE, a text encoder that reads bytes (any
class name works), and a denoiser trained with classifier-free guidance dropout (Rombach et al.,
arXiv:2112.10752; Ho and Salimans, arXiv:2207.12598).
"""

import contextlib
import hashlib
import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from safetensors.torch import load_model, save_model
from tokenizers import normalizers
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast

from d4m_plugin.cache import make_writable, written_whole
from d4m_plugin.callbacks import RunProgress
from d4m_plugin.devices import autocast, compute_dtype, default_device, trainer_precision
from d4m_plugin.errors import InputError
from d4m_plugin.progress import Progress
from d4m_plugin.seeding import seed_of
from d4m_plugin.sources import Digits, Source
from d4m_plugin.sources.images import to_pixels

LATENT_CHANNELS = 4  # what diffusers' image-to-image pipelines take as latents (SD and SDXL)
KL_WEIGHT = 1e-6  # Rombach et al., appendix G: only to keep the latents' scale bounded
PROMPT_DROPOUT = 0.1  # Ho and Salimans, section 4
SNR_CLAMP = 5.0  # gamma of Hang et al., arXiv:2303.09556
TEXT_LENGTH = 77  # tokens, CLIP's own
SCALE_SAMPLE = 5000  # images by which the latents' scale is measured
STEPS_A_CHECKPOINT = 500  # a killed run starts again from the last one


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return CLIP's tokenizer without merges and without its lower-casing.

    Each byte of a text is a token, so that no text is out of vocabulary and "A" is not "a".
    """
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{byte}</w>" for byte in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    clip = CLIPTokenizer(vocab=vocabulary, merges=[])
    clip.backend_tokenizer.normalizer = normalizers.NFC()
    names = {name: getattr(clip, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return PreTrainedTokenizerFast(tokenizer_object=clip.backend_tokenizer, model_max_length=TEXT_LENGTH, **names)


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """Return token ids of texts, int64, shape (len(texts), 77), as diffusers' pipelines make them."""
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    ids: Tensor = tokenizer(list(texts), **options).input_ids
    return ids


class _Rows:
    """Tensors of as many rows each, which the copy of a module that holds them shares."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors

    def __deepcopy__(self, memo: object) -> "_Rows":
        return self


class _Training(L.LightningModule):
    """Trains on batches that each step draws for itself, with replacement.

    Batch and noise depend on the seed and the step's number alone, so a run that resumes goes on as if it had not
    been stopped, which no state of a loader would give.
    """

    def __init__(self, tensors: Sequence[Tensor], batch_size: int, lr: float, seed: int) -> None:
        """Take tensors of as many rows each, of which a batch has `batch_size`, drawn by `seed`."""
        super().__init__()
        self.rows, self.batch_size, self.lr, self.seed = _Rows(tensors), batch_size, lr, seed

    def draw(self) -> list[Tensor]:
        """Return this step's batch, and seed its noise."""
        torch.manual_seed(seed_of(self.seed, self.global_step))
        chosen = torch.randint(len(self.rows.tensors[0]), (self.batch_size,))
        return [tensor[chosen].to(self.device) for tensor in self.rows.tensors]

    def train_dataloader(self) -> DataLoader[int]:
        """Lightning counts steps by a loader; this one's batches are numbers that nobody reads."""
        return DataLoader(range(self.trainer.max_steps), batch_size=None)  # type: ignore[arg-type]  # a range is a map too

    def compile_parts(self) -> None:
        """Compile what takes the time, in place: the names of the weights stay."""
        raise NotImplementedError

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with a short warm-up and a cosine schedule to zero."""
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=0.01, fused=True)
        steps = self.trainer.max_steps
        warmup = max(1, steps // 50)
        schedule = torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=warmup),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warmup)),
            ],
            milestones=[warmup],
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class AutoencoderTraining(_Training):
    """Trains an `AutoencoderKL` to reconstruct images, uint8 (N, 3, H, W): L1 and L2 loss and a little KL."""

    def __init__(self, vae: AutoencoderKL, images: Tensor, batch_size: int, lr: float, seed: int) -> None:
        super().__init__([images], batch_size, lr, seed)
        self.vae = vae

    def compile_parts(self) -> None:
        """Compile what takes the time, in place: the names of the weights stay."""
        self.vae.encoder.compile()
        self.vae.decoder.compile()

    def training_step(self, batch: int) -> Tensor:
        """Return the loss of a batch."""
        (images,) = self.draw()
        images = images.float() / 127.5 - 1
        posterior = self.vae.encode(images).latent_dist
        error = self.vae.decode(posterior.sample()).sample.float() - images
        loss: Tensor = error.abs().mean() + error.square().mean() + KL_WEIGHT * posterior.kl().mean()
        self.log("loss", loss, prog_bar=True)
        self.log("psnr", 10 * torch.log10(4 / error.detach().square().mean()), prog_bar=True)
        return loss


class DenoiserTraining(_Training):
    """Trains a U-Net and its text encoder to predict the velocity of noised latents.

    Velocity (Salimans and Ho, arXiv:2202.00512): v = sqrt(ᾱ) ε - sqrt(1 - ᾱ) x0, better behaved than ε at high
    noise, where guided synthesis starts. Its error is weighted by min(SNR, 5) / (SNR + 1) (Hang et al.,
    arXiv:2303.09556), so that nearly clean latents, of which there is little to learn, do not lead.
    """

    prompt_ids: Tensor

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        scheduler: DDIMScheduler,
        prompt_ids: Tensor,
        tensors: tuple[Tensor, Tensor],
        batch_size: int,
        lr: float,
        seed: int,
    ) -> None:
        """Take `prompt_ids`, int64 (classes + 1, 77), whose last row is the empty prompt, and latents and labels."""
        super().__init__(tensors, batch_size, lr, seed)
        self.unet, self.text_encoder, self.scheduler = unet, text_encoder, scheduler
        self.register_buffer("prompt_ids", prompt_ids, persistent=False)

    def compile_parts(self) -> None:
        """Compile what takes the time, in place: the names of the weights stay."""
        self.unet.compile()

    def training_step(self, batch: int) -> Tensor:
        """Return the loss of a batch of latents, float32 (B, C, h, w), and their labels, int64 (B,)."""
        latents, labels = self.draw()
        dropped = torch.rand(len(labels), device=labels.device) < PROMPT_DROPOUT
        rows, inverse = labels.masked_fill(dropped, len(self.prompt_ids) - 1).unique(return_inverse=True)
        prompts = self.text_encoder(self.prompt_ids[rows]).last_hidden_state[inverse]

        steps = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(steps, (len(latents),), device=latents.device)
        noise = torch.randn_like(latents)
        noised = self.scheduler.add_noise(latents, noise, timesteps)
        velocity = self.scheduler.get_velocity(latents, noise, timesteps)
        error = self.unet(noised, timesteps, prompts).sample.float() - velocity
        alphas = self.scheduler.alphas_cumprod.to(latents.device)[timesteps]
        weights = (alphas / (1 - alphas)).clamp(max=SNR_CLAMP) * (1 - alphas)
        loss: Tensor = (weights * error.square().mean((1, 2, 3))).mean()
        self.log("loss", loss, prog_bar=True)
        return loss


class _CheckpointOnTheWay(ModelCheckpoint):
    """Leaves out the last step: a run that resumed there would end without the weights' average."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Save a checkpoint where one is due."""
        if trainer.global_step < trainer.max_steps:
            super().on_train_batch_end(trainer, *args)


def _train(module: _Training, steps: int, callbacks: list[L.Callback], checkpoint: Path, compiled: bool) -> None:
    """Make exactly `steps` updates, from `checkpoint` on where there is one."""
    if compiled:
        module.compile_parts()
    kept = _CheckpointOnTheWay(
        checkpoint.parent, checkpoint.stem, every_n_train_steps=STEPS_A_CHECKPOINT, enable_version_counter=False
    )
    trainer = L.Trainer(
        max_steps=steps,
        deterministic="warn",  # a gather of prompts would else add its gradients in any order
        devices=1,  # small models: a second device would only divide the steps
        precision=trainer_precision(),
        callbacks=[*callbacks, kept],
        logger=False,
        enable_model_summary=False,
    )
    # On a CPU the flash kernel's backward takes a fifth of the step at these lengths; the plain one is faster.
    plain = sdpa_kernel(SDPBackend.MATH) if default_device().type == "cpu" else contextlib.nullcontext()
    with plain, warnings.catch_warnings():
        for expected in ("Checkpoint directory .* exists and is not empty", "You're resuming from a checkpoint that"):
            warnings.filterwarnings("ignore", expected)  # as after a kill; no step depends on the loader
        trainer.fit(module, ckpt_path=checkpoint if checkpoint.exists() else None)
    module.cpu().eval()


def _images(source: Source, size: int) -> tuple[Tensor, Tensor]:
    """Return the training images, uint8 (N, 3, size, size), and their labels, int64 (N,)."""
    train = source.train()
    images = torch.empty(len(train), 3, size, size, dtype=torch.uint8)
    for index in Progress("Reading", len(train), iterable=range(len(train))):
        images[index] = to_pixels(train[index][0], size)
    return images, torch.as_tensor(train.targets)


@torch.no_grad()
def _latents(vae: AutoencoderKL, images: Tensor, batch_size: int) -> Tensor:
    device = default_device()
    vae.to(device)
    with autocast(device, compute_dtype(device)):
        means = [
            vae.encode(batch.to(device).float() / 127.5 - 1).latent_dist.mean.float().cpu()
            for batch in images.split(batch_size)
        ]
    vae.cpu()
    return torch.cat(means)


def pretrain(
    source: Source | None = None,
    output: Path = Path("pretrained"),
    image_size: int | None = None,
    vae_channels: Sequence[int] = (16, 32, 64),
    unet_channels: Sequence[int] = (64, 128),
    vae_steps: int = 2000,
    unet_steps: int = 6000,
    batch_size: int = 64,
    vae_lr: float = 1e-3,
    unet_lr: float = 6e-4,
    compile: bool = False,
    seed: int = 0,
) -> Path:
    """Train a small latent diffusion pipeline on a source's training split.

    Unfinished work lies beside the output; the same command goes on from its last checkpoint (every 500 updates).

    Args:
        source: the real images; scikit-learn's digits by default.
        output: the folder to write: a stock `StableDiffusionPipeline`, float16.
        image_size: edge in pixels of what the pipeline makes; the source's own by default.
        vae_channels: channels of each level of the VAE, multiples of 16; each level after the first halves the edge.
        unet_channels: channels of each level of the U-Net, multiples of 32.
        vae_steps: updates of the VAE.
        unet_steps: updates of the U-Net and text encoder.
        batch_size: images an update.
        vae_lr: the VAE's peak learning rate.
        unet_lr: the U-Net's peak learning rate.
        compile: compile the models with `torch.compile`: some minutes first, a fifth less time for each update. Needs
            a C++ compiler on a CPU.
        seed: decides the initial weights, the batches and the noise.

    Returns:
        The folder.

    Raises:
        InputError: where the output folder exists, or the sizes do not fit.
    """
    source = source or Digits()
    image_size = image_size or source.image_size
    for name, channels, step in (("vae_channels", vae_channels, 16), ("unet_channels", unet_channels, 32)):
        if not channels or any(channel < 1 or channel % step for channel in channels):
            raise InputError(f"`{name}` is {list(channels)}; it must be multiples of {step}, one a level.")
    multiple = 2 ** (len(vae_channels) - 1 + len(unet_channels) - 1)
    if image_size % multiple:
        raise InputError(
            f"`image_size` is {image_size}; {len(vae_channels)} VAE and {len(unet_channels)} U-Net levels halve it to "
            f"whole pixels only from a multiple of {multiple}."
        )
    for name, value in (("vae_steps", vae_steps), ("unet_steps", unet_steps), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"`{name}` is {value}; it must be at least 1.")
    for name, rate in (("vae_lr", vae_lr), ("unet_lr", unet_lr)):
        if not rate > 0:
            raise InputError(f"`{name}` is {rate}; it must be above 0.")
    if output.exists():
        raise InputError(f"`output` is {str(output)!r}, which exists; name a new folder or remove it.")
    make_writable(output.resolve().parent, "output")

    options = [image_size, list(vae_channels), list(unet_channels), vae_steps, unet_steps, batch_size, vae_lr, unet_lr]
    decides = [source.fingerprint, list(source.classes), source.flip, *options, seed]
    partial = output.with_name(f"{output.name}.partial")
    work = partial / hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:12]
    work.mkdir(parents=True, exist_ok=True)

    images, labels = _images(source, image_size)
    if source.flip:
        images, labels = torch.cat([images, images.flip(-1)]), labels.repeat(2)
    L.seed_everything(seed, verbose=False)
    vae = _new_vae(image_size, vae_channels)
    trained = work / "vae.safetensors"
    if trained.exists():
        load_model(vae, trained)
    else:
        module = AutoencoderTraining(vae, images, batch_size, vae_lr, seed)
        _train(module, vae_steps, [RunProgress("VAE")], work / "vae.ckpt", compile)
        with written_whole(trained) as path:
            save_model(vae, str(path))
    sample = images[:: max(1, len(images) // SCALE_SAMPLE)]
    vae.register_to_config(scaling_factor=round(1 / _latents(vae, sample, batch_size).std().item(), 5))
    latents = _latents(vae, images, batch_size) * vae.config.scaling_factor
    del images

    L.seed_everything(seed, verbose=False)
    tokenizer = byte_tokenizer()
    text_encoder = _new_text_encoder(tokenizer)
    unet = _new_unet(latents.shape[-1], unet_channels, text_encoder.config.hidden_size)
    scheduler = DDIMScheduler(
        beta_start=0.00085,  # Stable Diffusion's schedule
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    # A decay that leaves e**-10 of the initial weights, however short the run.
    ema = get_ema_multi_avg_fn(max(0.0, min(0.999, 1 - 10 / unet_steps)))
    prompt_ids = tokenize(tokenizer, [*source.classes, ""])
    tensors = (latents, labels)
    denoiser = DenoiserTraining(unet, text_encoder, scheduler, prompt_ids, tensors, batch_size, unet_lr, seed)
    callbacks = [RunProgress("U-Net"), WeightAveraging(multi_avg_fn=ema)]
    _train(denoiser, unet_steps, callbacks, work / "unet.ckpt", compile)

    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text_encoder.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(work / "pipeline")
    (work / "pipeline").replace(output)
    shutil.rmtree(partial)
    return output


def _new_vae(image_size: int, channels: Sequence[int]) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        block_out_channels=list(channels),
        latent_channels=LATENT_CHANNELS,
        sample_size=image_size,
        norm_num_groups=16,
    )


def _new_text_encoder(tokenizer: PreTrainedTokenizerFast) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _new_unet(latent_size: int, channels: Sequence[int], text_width: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=["DownBlock2D"] + ["CrossAttnDownBlock2D"] * (len(channels) - 1),
        up_block_types=["CrossAttnUpBlock2D"] * (len(channels) - 1) + ["UpBlock2D"],
        block_out_channels=list(channels),
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=4,
    )
