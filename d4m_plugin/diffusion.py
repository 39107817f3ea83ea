"""A latent diffusion model as three maps: pixels to latents, latents to cleaner latents, latents to pixels.

"Pixels" are uint8 images, shape (B, 3, H, W). "Latents" are float32, shape (B, C, h, w), times the VAE's
`scaling_factor` (after its `shift_factor`, where it has one): what diffusers' pipelines denoise.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d4m_plugin.devices import autocast, compute_dtype, default_device
from d4m_plugin.errors import InputError

ASSETS = Path(__file__).parent / "assets"
EMBEDDED = ("digits", "cifar10")
LICENSE = "apache-2.0"  # of the embedded ones

# What `encode_prompt` of SD and SDXL returns, in order, by the names under which `__call__` takes it.
PROMPT_TENSORS = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)


class LatentDiffusion:
    """A stock diffusers image-to-image pipeline, loaded once and called in batches.

    Args:
        model: `digits` or `cifar10` (embedded), a folder, or a Hub id, as stable-diffusion-v1-5/stable-diffusion-v1-5.
        revision: branch, tag or commit of a Hub id.
        scheduler: name of a diffusers scheduler class, such as DDIMScheduler; the model's own by default.
        device: where to compute; an accelerator where there is one by default.
        dtype: what the passes run in; by default half precision where the device is fast in it.

    Raises:
        InputError: where there is no such model or scheduler.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        scheduler: str | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.device = device or default_device()
        self.dtype = dtype or compute_dtype(self.device)
        self.pipeline = _load_pipeline(model, revision, self.device, self.dtype)
        if scheduler is not None:
            self.pipeline.scheduler = _scheduler_class(scheduler).from_config(self.pipeline.scheduler.config)
        self._encoded: dict[tuple[str, str], dict[str, Tensor]] = {}

    @property
    def resolution(self) -> int:
        """Edge in pixels of the images that the model was trained on."""
        denoiser = getattr(self.pipeline, "unet", None) or self.pipeline.transformer
        return int(denoiser.config.sample_size * self.pipeline.vae_scale_factor)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Return the latents of pixels: the posterior's mean (the authors' code samples; the mean is exact).

        Args:
            pixels: uint8, shape (B, 3, H, W), H and W multiples of the VAE's downsampling.
        """
        vae = self.pipeline.vae
        with autocast(self.device, self.dtype):
            posterior = vae.encode((pixels.to(self.device) / 127.5 - 1).to(vae.dtype)).latent_dist
        shift = vae.config.get("shift_factor") or 0.0
        latents: Tensor = (posterior.mean.float() - shift) * vae.config.scaling_factor
        return latents.cpu().contiguous()

    def cuts(self, prompt: str) -> bool:
        """Return whether a prompt is longer than each of the model's text encoders reads."""
        names = ("tokenizer", "tokenizer_2", "tokenizer_3")
        tokenizers = [each for name in names if (each := getattr(self.pipeline, name, None))]
        return all(len(each(prompt, verbose=False).input_ids) > each.model_max_length for each in tokenizers)

    @torch.inference_mode()
    def encode_prompt(self, prompt: str, negative_prompt: str) -> dict[str, Tensor]:
        """Return what the pipeline's call takes in place of a prompt, each with a leading dimension of 1."""
        with autocast(self.device, self.dtype):
            tensors = self.pipeline.encode_prompt(
                prompt=prompt,
                device=self.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
                negative_prompt=negative_prompt or None,  # None lets SDXL take its own empty prompt
            )
        return dict(zip(PROMPT_TENSORS, tensors, strict=False))

    @torch.inference_mode()
    def denoise(
        self,
        latents: Tensor,
        prompts: Sequence[str],
        generators: list[torch.Generator],
        *,
        negative_prompt: str = "",
        strength: float = 0.7,
        guidance_scale: float = 8.0,
        num_inference_steps: int = 50,
    ) -> Tensor:
        """Return latents noised to `strength` and denoised under their prompts (D4M, section 3.2).

        One call of the stock pipeline: both halves of classifier-free guidance go through the denoiser at once,
        and each noise comes from its own generator, so an image does not depend on its neighbours.

        Args:
            latents: where to start, shape (B, C, h, w).
            prompts: one text each.
            generators: one generator each, on the CPU.
            negative_prompt: what guidance leads away from.
            strength: share of the schedule to go through, in (0, 1]; 1 forgets the start.
            guidance_scale: how far to follow the prompt; 1 or less leaves the unconditional pass out.
            num_inference_steps: steps of the whole schedule, of which int(steps · strength) are made.
        """
        keys = [(prompt, negative_prompt) for prompt in prompts]
        # Images come class by class: the last batch's prompts are all that is worth keeping.
        self._encoded = {key: self._encoded.get(key) or self.encode_prompt(*key) for key in dict.fromkeys(keys)}
        encoded = [self._encoded[key] for key in keys]
        arguments = {name: torch.cat([each[name] for each in encoded]) for name in encoded[0]}
        self.pipeline.set_progress_bar_config(disable=True)
        with autocast(self.device, self.dtype):
            output = self.pipeline(
                image=latents.to(self.device),
                strength=strength,
                guidance_scale=guidance_scale,
                num_inference_steps=num_inference_steps,
                generator=generators,
                output_type="latent",
                **arguments,
            )
        denoised: Tensor = output.images.float().cpu().contiguous()
        return denoised

    @torch.inference_mode()
    def decode(self, latents: Tensor, size: int | None = None) -> Tensor:
        """Return the pixels of latents, resized to (size, size) where `size` differs from the VAE's output."""
        vae = self.pipeline.vae
        shift = vae.config.get("shift_factor") or 0.0
        with autocast(self.device, self.dtype):
            scaled = (latents.to(self.device) / vae.config.scaling_factor + shift).to(vae.dtype)
            images = vae.decode(scaled).sample.float()
        if size is not None and images.shape[-1] != size:
            images = torch.nn.functional.interpolate(images, (size, size), mode="bicubic", antialias=True)
        pixels: Tensor = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return pixels.cpu().contiguous()


def _load_pipeline(model: str, revision: str | None, device: torch.device, dtype: torch.dtype) -> Any:
    path = find_model(model)
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()  # they count files, not the user's images
    transformers.utils.logging.disable_progress_bar()
    try:
        pipeline = diffusers.AutoPipelineForImage2Image.from_pretrained(
            path,
            revision=revision,
            dtype=torch.float32 if device.type == "cpu" else dtype,  # a CPU gains by half passes, not half weights
            use_safetensors=True,  # a pickled checkpoint can run code
            safety_checker=None,  # it blacks images out without a word
            requires_safety_checker=False,
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"`diffusion` is {model!r}, which is no loadable image-to-image model: {reason}") from error
    return pipeline.to(device)


def find_model(model: str) -> str:
    """Return the folder or Hub id that a model's name stands for.

    Raises:
        InputError: where the name is none of ours, no folder, and not of a Hub id's form.
    """
    if model in EMBEDDED:
        return str(ASSETS / model)
    if Path(model).is_dir():
        if not (Path(model) / "model_index.json").is_file():
            raise InputError(
                f"`diffusion` is the folder {model!r}, which has no model_index.json: no diffusers pipeline."
            )
        return model
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return model
    known = ", ".join(EMBEDDED)
    raise InputError(f"`diffusion` is {model!r}: no model of ours ({known}), no folder, and no Hub id (owner/name).")


def _scheduler_class(name: str) -> Any:
    import diffusers

    scheduler = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if scheduler is None:
        raise InputError(f"`scheduler` is {name!r}; name a diffusers class such as DDIMScheduler or PNDMScheduler.")
    return scheduler
