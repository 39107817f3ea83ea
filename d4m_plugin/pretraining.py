"""Train a small latent diffusion pipeline on a source: how the embedded models are made.

For images that no public diffusion model knows. The product is a stock `StableDiffusionPipeline` folder, so
everything after it takes the same road as with Stable Diffusion: a VAE, a text encoder that reads bytes (any
class name works), and a denoiser trained with classifier-free guidance dropout (Rombach et al.,
arXiv:2112.10752; Ho and Salimans, arXiv:2207.12598).
"""

import shutil
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import lightning as L
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from lightning.pytorch.callbacks import WeightAveraging
from tokenizers import normalizers
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast

from d4m_plugin.cache import digest, make_writable, resolve_cache_dir
from d4m_plugin.callbacks import RunProgress
from d4m_plugin.checking import check_above_zero, check_least
from d4m_plugin.devices import autocast, compute_dtype, default_device
from d4m_plugin.diffusion import LatentDiffusion, model_digest
from d4m_plugin.errors import InputError, InputWarning
from d4m_plugin.latent_training import AutoencoderTraining, DenoiserTraining, train
from d4m_plugin.progress import Progress
from d4m_plugin.screening import check_images, readable_source
from d4m_plugin.sources import LabelledImages, Source
from d4m_plugin.sources.images import squares_of
from d4m_plugin.units import DamagedError, in_turn, load_tensors, save_tensors

LATENT_CHANNELS = 4  # what diffusers' image-to-image pipelines take as latents (SD and SDXL)
TEXT_LENGTH = 77  # tokens, CLIP's own
SCALE_SAMPLE = 5000  # images by which the latents' scale is measured


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


def text_config(tokenizer: PreTrainedTokenizerFast, **sizes: int) -> CLIPTextConfig:
    """Return the configuration of a CLIP text encoder that reads a tokenizer's tokens."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """Return token ids of texts, int64, shape (len(texts), 77), as diffusers' pipelines make them."""
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    ids: Tensor = tokenizer(list(texts), **options).input_ids
    return ids


def _pixels(images: LabelledImages, size: int, num_workers: int) -> Tensor:
    """Return images, uint8 (N, 3, size, size)."""
    with Progress("Reading", len(images)) as progress:
        return squares_of(images, size, num_workers=num_workers, progress=progress)


@torch.no_grad()
def _latents(vae: AutoencoderKL, images: Tensor, batch_size: int) -> Tensor:
    device = default_device()
    vae.to(device)
    means = []
    with autocast(device, compute_dtype(device)), Progress("Encoding", len(images)) as progress:
        for batch in images.split(batch_size):
            means.append(vae.encode(batch.to(device).float() / 127.5 - 1).latent_dist.mean.float().cpu())
            progress.update(len(batch))
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
    start_from: str | None = None,
    seed: int = 0,
    num_workers: int = 0,
    skip_bad_images: bool = False,
    cache_dir: Path | None = None,
) -> Path:
    """Train a small latent diffusion pipeline on a source's training split.

    Unfinished work lies beside the output; the same command goes on from its last checkpoint (every 500 updates).

    Args:
        source: the real images; scikit-learn's digits by default.
        output: the folder to write: a stock `StableDiffusionPipeline`, float16.
        image_size: edge in pixels of what the pipeline makes; by default that of `start_from`, else the source's own.
        vae_channels: channels of each level of the VAE, multiples of 16; each level after the first halves the edge.
        unet_channels: channels of each level of the U-Net, multiples of 32.
        vae_steps: updates of the VAE.
        unet_steps: updates of the U-Net and text encoder.
        batch_size: images an update.
        vae_lr: the VAE's peak learning rate.
        unet_lr: the U-Net's peak learning rate.
        compile: compile the models with `torch.compile`: some minutes first, a fifth less time for each update. Needs
            a C++ compiler on a CPU.
        start_from: a pipeline that this command made (a folder, `digits` or `cifar10`), whose U-Net and text encoder go
            on learning; its VAE and image size stay as they are, and the options of channels and VAE do nothing.
        seed: decides the initial weights, the batches and the noise.
        num_workers: processes that read the images.
        skip_bad_images: leave out images that cannot be read; by default they stop the work.
        cache_dir: where what the first pass found is kept; by default $D4M_CACHE, else d4m in $XDG_CACHE_HOME or
            ~/.cache.

    Returns:
        The folder.

    Raises:
        InputError: where the output folder exists, the sizes do not fit, `start_from` is no such pipeline, an image
            cannot be read or a label is no number of a class.
    """
    source = readable_source(source, skip_bad_images, cache_dir, num_workers)
    check_least(1, vae_steps=vae_steps, unet_steps=unet_steps, batch_size=batch_size, image_size=image_size)
    if not 0 <= seed < 2**32:
        raise InputError(f"`seed` is {seed}; it must be at least 0 and below 2^32.")
    check_above_zero(vae_lr=vae_lr, unet_lr=unet_lr)
    _check_is_new(output)
    pipeline = _opened(start_from) if start_from else None
    own_size = pipeline.vae.config.sample_size if pipeline else source.image_size
    image_size = image_size or own_size
    if pipeline is None:
        _check_sizes(image_size, vae_channels, unet_channels)
    elif image_size != own_size:
        size = f"of {own_size} pixels, and `image_size` {image_size}"
        raise InputError(f"`start_from` is {start_from!r}, {size}; use its own.")
    make_writable(output.resolve().parent, "output")
    train_images = source.train()
    cache = resolve_cache_dir(cache_dir)
    check_images(source, train_images, "training images", source.fingerprint, cache, num_workers)

    options = [image_size, list(vae_channels), list(unet_channels), vae_steps, unet_steps, batch_size, vae_lr, unet_lr]
    start = model_digest(start_from) if start_from else ""
    decides = [source.fingerprint, list(source.classes), source.flip, *options, start, seed]
    partial = output.with_name(f"{output.name}.partial")
    work = partial / digest(decides)[:12]
    work.mkdir(parents=True, exist_ok=True)
    with in_turn(output.with_name(f".{output.name}"), f"trains {str(output)!r}"):
        if output.exists() and not work.exists():  # made by the same options meanwhile
            return output
        _check_is_new(output)
        images = _pixels(train_images, image_size, num_workers)
        labels = torch.as_tensor(train_images.targets, dtype=torch.int64)
        if source.flip:
            images, labels = torch.cat([images, images.flip(-1)]), labels.repeat(2)
        if pipeline is None:
            L.seed_everything(seed, verbose=False)
            vae = _new_vae(image_size, vae_channels)
            _train_vae(AutoencoderTraining(vae, images, batch_size, vae_lr, seed), vae_steps, work, compile)
            sample = images[:: max(1, len(images) // SCALE_SAMPLE)]
            vae.register_to_config(scaling_factor=round(1 / _latents(vae, sample, batch_size).std().item(), 5))
            L.seed_everything(seed, verbose=False)
            pipeline = _new_pipeline(vae, image_size // 2 ** (len(vae_channels) - 1), unet_channels)
        latents = _latents(pipeline.vae, images, batch_size) * pipeline.vae.config.scaling_factor
        del images

        # A decay that leaves e**-10 of the initial weights, however short the run.
        ema = get_ema_multi_avg_fn(max(0.0, min(0.999, 1 - 10 / unet_steps)))
        prompt_ids = tokenize(pipeline.tokenizer, [*source.classes, ""])
        denoiser = DenoiserTraining(pipeline, prompt_ids, (latents, labels), batch_size, unet_lr, seed)
        callbacks = [RunProgress("U-Net"), WeightAveraging(multi_avg_fn=ema)]
        train(denoiser, unet_steps, callbacks, work / "unet.ckpt", compile)

        for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
            part.half()
        pipeline.save_pretrained(work / "pipeline")
        for weights in (work / "pipeline").rglob("*.safetensors"):
            weights.chmod((weights.parent / "config.json").stat().st_mode)  # as `write_tensors` does
        (work / "pipeline").replace(output)
        shutil.rmtree(work)
    with suppress(OSError):  # other options' work may be there
        partial.rmdir()
    return output


def _train_vae(training: AutoencoderTraining, steps: int, work: Path, compile: bool) -> None:
    """Train a VAE, once: its weights are kept in `work`."""
    trained = work / "vae.safetensors"
    try:
        training.vae.load_state_dict(load_tensors(trained))
        return
    except FileNotFoundError:
        pass
    except DamagedError as error:
        warnings.warn(f"{error} The VAE is trained again.", InputWarning, stacklevel=2)
    train(training, steps, [RunProgress("VAE")], work / "vae.ckpt", compile)
    save_tensors(trained, training.vae.state_dict())


def _check_is_new(output: Path) -> None:
    if output.exists():
        raise InputError(f"`output` is {str(output)!r}, which exists; name a new folder or remove it.")


def _check_sizes(image_size: int, vae_channels: Sequence[int], unet_channels: Sequence[int]) -> None:
    for name, channels, step in (("vae_channels", vae_channels, 16), ("unet_channels", unet_channels, 32)):
        if not channels or any(channel < 1 or channel % step for channel in channels):
            raise InputError(f"`{name}` is {list(channels)}; it must be multiples of {step}, one a level.")
    multiple = 2 ** (len(vae_channels) - 1 + len(unet_channels) - 1)
    if image_size % multiple:
        raise InputError(
            f"`image_size` is {image_size}; {len(vae_channels)} VAE and {len(unet_channels)} U-Net levels halve it to "
            f"whole pixels only from a multiple of {multiple}."
        )


def _opened(name: str) -> StableDiffusionPipeline:
    """Return a new pipeline with the weights of one that was made here, in float32, to go on with."""
    made = LatentDiffusion(name, device=torch.device("cpu")).pipeline
    try:
        size, scheduler = made.vae.config.sample_size, made.scheduler.config
        vae = _new_vae(size, made.vae.config.block_out_channels)
        vae.register_to_config(scaling_factor=made.vae.config.scaling_factor)
        pipeline = _new_pipeline(vae, made.unet.config.sample_size, made.unet.config.block_out_channels)
        if scheduler.prediction_type != pipeline.scheduler.config.prediction_type:
            raise ValueError(scheduler.prediction_type)
        for part in ("vae", "text_encoder", "unet"):
            getattr(pipeline, part).load_state_dict(getattr(made, part).state_dict())
    except (AttributeError, RuntimeError, ValueError) as error:
        raise InputError(f"`start_from` is {name!r}, which is no pipeline of `d4m pretrain`.") from error
    return pipeline


def _new_vae(image_size: int, channels: Sequence[int]) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        block_out_channels=list(channels),
        latent_channels=LATENT_CHANNELS,
        sample_size=image_size,
        norm_num_groups=16,
    )


def _new_pipeline(vae: AutoencoderKL, latent_size: int, unet_channels: Sequence[int]) -> StableDiffusionPipeline:
    """Return a pipeline whose U-Net and text encoder have learnt nothing."""
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    text_encoder = CLIPTextModel(text_config(tokenizer, **sizes))
    scheduler = DDIMScheduler(
        beta_start=0.00085,  # Stable Diffusion's schedule
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=_new_unet(latent_size, unet_channels, text_encoder.config.hidden_size),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
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
