"""Train a small latent diffusion pipeline on a source: how the embedded models are made.

For images that no public diffusion model knows. The product is a stock `StableDiffusionPipeline` folder, so
everything after it takes the same road as with Stable Diffusion: a VAE, a text encoder that reads bytes (any
class name works), and a denoiser trained with classifier-free guidance dropout (Rombach et al.,
arXiv:2112.10752; Ho and Salimans, arXiv:2207.12598).
"""

from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from tokenizers import normalizers
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from torchvision.transforms import v2
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast

from d4m_plugin.cache import make_writable
from d4m_plugin.callbacks import RunProgress
from d4m_plugin.devices import autocast, compute_dtype, default_device, trainer_precision
from d4m_plugin.errors import InputError
from d4m_plugin.sources import Digits, Source

LATENT_CHANNELS = 4  # what diffusers' image-to-image pipelines take as latents (SD and SDXL)
KL_WEIGHT = 1e-6  # Rombach et al., appendix G: only to keep the latents' scale bounded
PROMPT_DROPOUT = 0.1  # Ho and Salimans, section 4
TEXT_LENGTH = 77  # tokens, CLIP's own


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


class AutoencoderTraining(L.LightningModule):
    """Trains an `AutoencoderKL` to reconstruct images: L1 and L2 loss and a little KL."""

    def __init__(self, vae: AutoencoderKL, lr: float) -> None:
        super().__init__()
        self.vae, self.lr = vae, lr

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Return the loss of a batch of images, uint8, shape (B, 3, H, W)."""
        images = batch[0].float() / 127.5 - 1
        posterior = self.vae.encode(images).latent_dist
        error = self.vae.decode(posterior.sample()).sample.float() - images
        loss: Tensor = error.abs().mean() + error.square().mean() + KL_WEIGHT * posterior.kl().mean()
        self.log("loss", loss, prog_bar=True)
        self.log("psnr", 10 * torch.log10(4 / error.detach().square().mean()), prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with a cosine schedule to zero."""
        return _adamw_cosine(self, self.lr)


class DenoiserTraining(L.LightningModule):
    """Trains a U-Net and its text encoder to predict the velocity of noised latents.

    Velocity (Salimans and Ho, arXiv:2202.00512): v = sqrt(ᾱ) ε - sqrt(1 - ᾱ) x0, better behaved than ε at high
    noise, where guided synthesis starts.
    """

    prompt_ids: Tensor

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        scheduler: DDIMScheduler,
        prompt_ids: Tensor,
        lr: float,
    ) -> None:
        """Take `prompt_ids`, int64 (classes + 1, 77), whose last row is the empty prompt."""
        super().__init__()
        self.unet, self.text_encoder, self.scheduler, self.lr = unet, text_encoder, scheduler, lr
        self.register_buffer("prompt_ids", prompt_ids, persistent=False)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Return the loss of a batch of latents, float32 (B, C, h, w), and their labels, int64 (B,)."""
        latents, labels = batch
        dropped = torch.rand(len(labels), device=labels.device) < PROMPT_DROPOUT
        rows, inverse = labels.masked_fill(dropped, len(self.prompt_ids) - 1).unique(return_inverse=True)
        prompts = self.text_encoder(self.prompt_ids[rows]).last_hidden_state[inverse]

        steps = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(steps, (len(latents),), device=latents.device)
        noise = torch.randn_like(latents)
        noised = self.scheduler.add_noise(latents, noise, timesteps)
        velocity = self.scheduler.get_velocity(latents, noise, timesteps)
        loss = F.mse_loss(self.unet(noised, timesteps, prompts).sample.float(), velocity)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with a cosine schedule to zero."""
        return _adamw_cosine(self, self.lr)


def _adamw_cosine(module: L.LightningModule, lr: float) -> OptimizerLRScheduler:
    optimizer = torch.optim.AdamW(module.parameters(), lr, weight_decay=0.01, fused=True)
    steps = int(module.trainer.estimated_stepping_batches)
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


def _train(
    module: L.LightningModule, dataset: TensorDataset, steps: int, batch_size: int, callbacks: list[L.Callback]
) -> None:
    """Fit a module for exactly `steps` batches drawn with replacement, as one epoch."""
    sampler = RandomSampler(dataset, replacement=True, num_samples=steps * batch_size)
    trainer = L.Trainer(
        max_epochs=1,
        deterministic="warn",  # a gather of prompts would else add its gradients in any order
        devices=1,  # small models: a second device would only divide the steps
        precision=trainer_precision(),
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(dataset, batch_size, sampler=sampler))
    module.cpu().eval()


def _images(source: Source, size: int) -> tuple[Tensor, Tensor]:
    """Return the training images, uint8 (N, 3, size, size), and their labels, int64 (N,)."""
    transform = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.RGB(), v2.PILToTensor()])
    train = source.train()
    images = torch.stack([transform(train[index][0]) for index in range(len(train))])
    return images, torch.tensor(train.targets)


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
    seed: int = 0,
) -> Path:
    """Train a small latent diffusion pipeline on a source's training split.

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
    downsampling = 2 ** (len(vae_channels) - 1)
    multiple = downsampling * 2 ** (len(unet_channels) - 1)
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

    L.seed_everything(seed)
    images, labels = _images(source, image_size)
    if source.flip:
        images, labels = torch.cat([images, images.flip(-1)]), labels.repeat(2)

    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(vae_channels),
        up_block_types=["UpDecoderBlock2D"] * len(vae_channels),
        block_out_channels=list(vae_channels),
        latent_channels=LATENT_CHANNELS,
        sample_size=image_size,
        norm_num_groups=16,
    )
    bar = RunProgress("VAE")
    _train(AutoencoderTraining(vae, vae_lr), TensorDataset(images), vae_steps, batch_size, [bar])

    latents = _latents(vae, images, batch_size)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    latents *= vae.config.scaling_factor

    tokenizer = byte_tokenizer()
    text_encoder = CLIPTextModel(
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
    unet = UNet2DConditionModel(
        sample_size=image_size // downsampling,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=["DownBlock2D"] + ["CrossAttnDownBlock2D"] * (len(unet_channels) - 1),
        up_block_types=["CrossAttnUpBlock2D"] * (len(unet_channels) - 1) + ["UpBlock2D"],
        block_out_channels=list(unet_channels),
        layers_per_block=1,
        cross_attention_dim=text_encoder.config.hidden_size,
        attention_head_dim=4,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,  # Stable Diffusion's schedule
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    module = DenoiserTraining(unet, text_encoder, scheduler, tokenize(tokenizer, [*source.classes, ""]), unet_lr)
    # A decay that leaves e**-10 of the initial weights, however short the run.
    ema = EMAWeightAveraging(decay=max(0.0, min(0.999, 1 - 10 / unet_steps)))
    _train(module, TensorDataset(latents, labels), unet_steps, batch_size, [RunProgress("U-Net"), ema])

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
    pipeline.save_pretrained(output)
    return output
