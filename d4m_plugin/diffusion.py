"""A latent diffusion model as three maps: pixels to latents, latents to cleaner latents, latents to pixels.

"Pixels" are uint8 images, shape (B, 3, H, W). "Latents" are float32, shape (B, C, h, w), times the VAE's
`scaling_factor` (after its `shift_factor`, where it has one): what diffusers' pipelines denoise.
"""

import functools
import importlib.util
import inspect
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from d4m_plugin.cache import checksum, digest
from d4m_plugin.devices import Batches, autocast, compute_dtype, default_device, out_of_memory
from d4m_plugin.errors import InputError, first_line
from d4m_plugin.hub import is_hub_id, why_unread
from d4m_plugin.mode_guidance import pulled_toward

ASSETS = Path(__file__).parent / "assets"
EMBEDDED = ("digits", "cifar10")
LICENSE = "apache-2.0"  # of the embedded ones
DECODED_AT_ONCE = 2**20  # pixels: four images of 512x512

# What `encode_prompt` returns, in order, by the names under which `__call__` takes it: of SD, SDXL and SD3, whose
# guidance makes a second pass, and of FLUX, which was trained to need none.
GUIDED = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
UNGUIDED = ("prompt_embeds", "pooled_prompt_embeds")


class LatentDiffusion:
    """A stock diffusers image-to-image pipeline, loaded once and called in batches.

    Args:
        model: `digits` or `cifar10` (embedded), a folder, a `.safetensors` file of a whole model, or a Hub id, as
            stable-diffusion-v1-5/stable-diffusion-v1-5.
        revision: branch, tag or commit of a Hub id.
        scheduler: name of a diffusers scheduler class, such as DDIMScheduler; the model's own by default.
        scheduler_options: of the scheduler, in place of the model's own.
        vae: a folder or Hub id of a VAE of the same latents, such as a tiny one, in place of the model's own.
        lora: a folder, file or Hub id of LoRA weights that are added to the model's; needs peft.
        device: where to compute; an accelerator where there is one by default.
        dtype: what the passes run in; by default half precision where the device is fast in it.
        compile: compile the denoiser with `torch.compile`.

    Raises:
        InputError: where there is no such model, scheduler, VAE or LoRA.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        scheduler: str | None = None,
        scheduler_options: dict[str, Any] | None = None,
        vae: str | None = None,
        lora: str | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        compile: bool = False,
    ) -> None:
        self.device = device or default_device()
        self.dtype = dtype or compute_dtype(self.device)
        # A CPU gains by half passes, not half weights.
        self.pipeline = _load_pipeline(model, revision, torch.float32 if self.device.type == "cpu" else self.dtype)
        if vae is not None:
            self.pipeline.vae = _load_vae(vae, self.pipeline.vae)
        if lora is not None:
            _add_lora(self.pipeline, lora)
        if self.dtype == torch.float16 and self.pipeline.vae.config.get("force_upcast"):
            with _quietly():
                self.pipeline.vae.to(torch.float32)  # in float16 it overflows, as SDXL's does
        if scheduler is not None or scheduler_options:
            self.pipeline.scheduler = _make_scheduler(self.pipeline.scheduler, scheduler, scheduler_options or {})
        if compile:
            self._denoiser.to(memory_format=torch.channels_last).compile()
        self.pipeline.vae.to(self.device)  # small and in each stage; the others come and go
        self._encoded: dict[tuple[str, str], dict[str, Tensor]] = {}

    @property
    def _denoiser(self) -> Any:
        return getattr(self.pipeline, "unet", None) or self.pipeline.transformer

    @property
    def modules(self) -> list[nn.Module]:
        """The parts of the pipeline that have weights."""
        return [part for part in self.pipeline.components.values() if isinstance(part, nn.Module)]

    def _bring(self, wanted: Collection[Any]) -> None:
        """Have some parts of the pipeline on the device beside the VAE, and no others: they take turns in memory.

        But where all of them leave most of it free, they stay: the batches of few-step models are soon done.
        """
        weights = sum(tensor.nbytes for tensor in self._tensors())
        if weights < _memory_of(self.device) / 4:
            wanted = self.modules
        for part in sorted(self.modules, key=lambda part: part in wanted):  # first out, then in
            if part is not self.pipeline.vae:
                part.to(self.device if part in wanted else "cpu")

    @property
    def resolution(self) -> int:
        """Edge in pixels of the images that the model was trained on."""
        edge = self._denoiser.config.get("sample_size") or self.pipeline.default_sample_size
        return int(edge * self.pipeline.vae_scale_factor)

    @property
    def _takes(self) -> Collection[str]:
        """The options of the pipeline's call."""
        return inspect.signature(self.pipeline.__call__).parameters.keys()

    @property
    def _is_flux(self) -> bool:
        return "true_cfg_scale" in self._takes

    def check_resolution(self, resolution: int | None) -> int:
        """Return the edge in pixels that images are encoded at, the model's own where none is named.

        Raises:
            InputError: where the model's latents have no such edge.
        """
        if resolution is None:
            return self.resolution
        patch = 2 if self._is_flux else self._denoiser.config.get("patch_size") or 1
        step = self.pipeline.vae_scale_factor * patch
        if resolution % step:
            raise InputError(f"`resolution` is {resolution}; {type(self.pipeline).__name__} takes multiples of {step}.")
        return resolution

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """Return the shape of an image's latents, (C, h, w), at an edge in pixels."""
        edge = resolution // self.pipeline.vae_scale_factor
        return self.pipeline.vae.config.latent_channels, edge, edge

    def steps_of(self, num_inference_steps: int, strength: float) -> int:
        """Return the steps that are made of each image's schedule, as the pipeline itself rounds them.

        Args:
            num_inference_steps: of the whole schedule.
            strength: share of it to go through; an LCM's makes all its steps, closer together.
        """
        if "original_inference_steps" in self._takes:
            return num_inference_steps
        return int(self.pipeline.get_timesteps(num_inference_steps, strength, self.device)[1])

    def check_steps(self, num_inference_steps: int, strength: float) -> None:
        """Refuse steps that the schedule has not.

        Raises:
            InputError: where it has fewer, or cannot make as few; an LCM's has fewer at less strength. Or where the
                scheduler draws noise that no generator of ours decides.
        """
        scheduler, told = self.pipeline.scheduler, f"`num_inference_steps` is {num_inference_steps}"
        kind = type(scheduler).__name__
        if "noise_sampler_seed" in scheduler.config:
            raise InputError(f"`scheduler` is {kind!r}, whose noise `seed` does not decide; name another.")
        most = scheduler.config.get("num_train_timesteps", num_inference_steps)
        if num_inference_steps > most:
            raise InputError(f"{told}; the model's schedule has {most} steps.")
        if "mu" in inspect.signature(scheduler.set_timesteps).parameters:
            return  # a flow's, which takes any number, and what the pipeline makes of the image's size
        options = {"strength": strength} if "original_inference_steps" in self._takes else {}
        try:
            scheduler.set_timesteps(num_inference_steps, **options)
        except (ValueError, IndexError) as error:
            raise InputError(f"{told}, which {kind} cannot make at `strength` {strength}: {error}") from error

    @contextmanager
    def answering_once(self) -> Iterator[list[Any]]:
        """Have the denoiser's first answer stand for all that follow for a while: a trial of the rest, by one pass.

        Yields:
            The answers that it has given.
        """
        forward, answers = self._denoiser.forward, list[Any]()

        def answer(*args: Any, **kwargs: Any) -> Any:
            answers.append(answers[0] if answers else forward(*args, **kwargs))
            return answers[0]

        try:
            # Compiling would take minutes.
            with _replaced(self._denoiser, forward=answer), torch.compiler.set_stance("force_eager"):
                yield answers
        finally:
            self._bring([])

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Compute in float32 for a while, with weights in it."""
        kept = [tensor.dtype for tensor in self._tensors()]  # T5 has a few in float32 among those in float16
        dtype, self.dtype, self._encoded = self.dtype, torch.float32, {}
        try:
            with _quietly():
                self.pipeline.to(torch.float32)
            yield
        finally:
            self.dtype, self._encoded = dtype, {}
            for tensor, own in zip(self._tensors(), kept, strict=True):
                tensor.data = tensor.data.to(own)

    def _tensors(self) -> list[Tensor]:
        return [tensor for part in self.modules for tensor in (*part.parameters(), *part.buffers())]

    def _autocast(self, part: Any) -> torch.autocast:
        """Return a context of half passes for whole weights.

        Half ones run as they are: autocast would bring each norm to float32 and back, and undo the float32 that T5
        keeps where float16 overflows.
        """
        return autocast(self.device, self.dtype if part.dtype == torch.float32 else torch.float32)

    @property
    def _vae_autocast(self) -> torch.autocast:
        if self.dtype == torch.float16:  # whole weights are there since half passes overflow
            return autocast(self.device, torch.float32)
        return self._autocast(self.pipeline.vae)

    def _or_in_tiles(self, work: Callable[[Tensor], Any], batch: Tensor) -> Any:
        """Run the VAE, in tiles where the device's memory does not hold one image whole: rather seams than an end."""
        vae = self.pipeline.vae
        try:
            return work(batch)
        except RuntimeError as error:
            if not out_of_memory(error) or len(batch) > 1 or getattr(vae, "use_tiling", True):
                raise  # fewer images at once may do; or tiles do not
        vae.enable_tiling()
        return work(batch)

    def _shift_and_scale(self) -> tuple[Any, Any]:
        """Return what is taken from the VAE's output, and what the rest is multiplied by."""
        config = self.pipeline.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:  # by channel
            mean, std = (torch.tensor(each, device=self.device).view(1, -1, 1, 1) for each in (mean, std))
            return mean, config.scaling_factor / std
        return config.get("shift_factor") or 0.0, config.scaling_factor

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Return the latents of pixels: the posterior's mean (the authors' code samples; the mean is exact).

        Args:
            pixels: uint8, shape (B, 3, H, W), H and W multiples of the VAE's downsampling.
        """
        vae = self.pipeline.vae
        with self._vae_autocast:
            encoded = self._or_in_tiles(vae.encode, (pixels.to(self.device) / 127.5 - 1).to(vae.dtype))
        # A tiny VAE gives latents and no distribution.
        means = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents
        shift, scale = self._shift_and_scale()
        latents: Tensor = (means.float() - shift) * scale
        return latents.cpu().contiguous()

    def cuts(self, prompt: str) -> bool:
        """Return whether a prompt is longer than each of the model's text encoders reads."""
        names = ("tokenizer", "tokenizer_2", "tokenizer_3")
        tokenizers = [each for name in names if (each := getattr(self.pipeline, name, None))]
        return all(len(each(prompt, verbose=False).input_ids) > each.model_max_length for each in tokenizers)

    @torch.inference_mode()
    def encode_prompt(self, prompt: str, negative_prompt: str) -> dict[str, Tensor]:
        """Return what the pipeline's call takes in place of a prompt, each with a leading dimension of 1."""
        takes = inspect.signature(self.pipeline.encode_prompt).parameters
        options: dict[str, Any] = {name: None for name in ("prompt_2", "prompt_3") if name in takes}  # the same prompt
        names: tuple[str, ...] = UNGUIDED
        if self._is_flux:
            options["max_sequence_length"] = 512 if self.pipeline.transformer.config.guidance_embeds else 256  # schnell
        if negative_prompt and not ("negative_prompt" in takes and "negative_prompt_embeds" in self._takes):
            kind = type(self.pipeline).__name__
            raise InputError(f"`negative_prompt` is {negative_prompt!r}, but {kind} takes none; leave it out.")
        if "do_classifier_free_guidance" in takes:
            names = GUIDED
            # None lets SDXL take its own empty prompt
            options |= {"do_classifier_free_guidance": True, "negative_prompt": negative_prompt or None}
        self._bring([part for name, part in self.pipeline.components.items() if name.startswith("text_encoder")])
        with self._autocast(self._denoiser), _quietly():
            tensors = self.pipeline.encode_prompt(prompt=prompt, device=self.device, num_images_per_prompt=1, **options)
        return {name: tensor for name, tensor in zip(names, tensors, strict=False) if name in self._takes}

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
        mode_guidance_scale: float = 0.0,
        mode_guidance_stop: float = 0.5,
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
            num_inference_steps: steps of the whole schedule, of which `steps_of` are made.
            mode_guidance_scale: how far each step is pulled back to the start; 0 leaves it alone.
            mode_guidance_stop: share of the schedule after which it is left alone.

        Raises:
            InputError: where the pipeline takes no negative prompt, or no step is pulled.
        """
        keys = [(prompt, negative_prompt) for prompt in prompts]
        # Images come class by class: the last batch's prompts are all that is worth keeping.
        self._encoded = {key: self._encoded.get(key) or self.encode_prompt(*key) for key in dict.fromkeys(keys)}
        encoded = [self._encoded[key] for key in keys]
        arguments: dict[str, Any] = {name: torch.cat([each[name] for each in encoded]) for name in encoded[0]}
        edge = latents.shape[-1] * self.pipeline.vae_scale_factor
        if "height" in self._takes:  # of SD3 and FLUX, which shift the noise by it
            arguments |= {"height": edge, "width": edge}
        self.pipeline.set_progress_bar_config(disable=True)
        self._bring([self._denoiser])
        latents, scheduler = latents.to(self.device), self.pipeline.scheduler
        step = scheduler.step
        if "generator" in inspect.signature(step).parameters:  # which the pipelines of flows leave out
            step = functools.partial(step, generator=generators)
        if mode_guidance_scale:
            packed = self.pipeline._pack_latents(latents, *latents.shape) if self._is_flux else latents
            step = pulled_toward(packed, scheduler, step, mode_guidance_scale, mode_guidance_stop)
        with self._autocast(self._denoiser), _replaced(scheduler, step=step):
            output = self.pipeline(
                image=latents,
                strength=strength,
                guidance_scale=guidance_scale,
                num_inference_steps=num_inference_steps,
                generator=generators,
                output_type="latent",
                **arguments,
            )
        denoised: Tensor = output.images
        if denoised.ndim == 3:  # FLUX's, packed as a sequence of squares of 2x2
            denoised = self.pipeline._unpack_latents(denoised, edge, edge, self.pipeline.vae_scale_factor)
        return denoised.float().cpu().contiguous()

    @torch.inference_mode()
    def decode(self, latents: Tensor, size: int | None = None) -> Tensor:
        """Return the pixels of latents, resized to (size, size) where `size` differs from the VAE's output.

        A few images at once: decoding takes more memory than all steps before it, and large images are no faster
        together.
        """
        edge = latents.shape[-1] * self.pipeline.vae_scale_factor
        batches = Batches(max(1, DECODED_AT_ONCE // edge**2))
        return torch.cat(batches.run(lambda few: self._decode(latents[few], size), len(latents)))

    def _decode(self, latents: Tensor, size: int | None) -> Tensor:
        vae = self.pipeline.vae
        shift, scale = self._shift_and_scale()
        with self._vae_autocast:
            scaled = (latents.to(self.device) / scale + shift).to(vae.dtype)
            images = self._or_in_tiles(vae.decode, scaled).sample.float()
        if size is not None and images.shape[-1] != size:
            images = torch.nn.functional.interpolate(images, (size, size), mode="bicubic", antialias=True)
        pixels: Tensor = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return pixels.cpu().contiguous()


def embedded_prompts(model: str) -> list[str]:
    """Return the prompts that an embedded model was trained with, the names of its classes; none of other models."""
    if model not in EMBEDDED:
        return []
    with safe_open(ASSETS / model / "teacher.safetensors", "pt") as file:
        names: list[str] = json.loads(file.metadata()["data"])["classes"]
    return names


def _memory_of(device: torch.device) -> int:
    """Return the bytes of an accelerator's memory; 0 where they cannot be told."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


@contextmanager
def _replaced(owner: Any, **methods: Callable[..., Any]) -> Iterator[None]:
    """Have an object do in another way, for a while, what its class says."""
    vars(owner).update(methods)
    try:
        yield
    finally:
        for name in methods:
            delattr(owner, name)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep the libraries from logging that a prompt is cut off, of which we warn once, or that weights are cast."""
    import diffusers
    import transformers

    logs = (diffusers.utils.logging, transformers.utils.logging)
    levels = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)


def _load_pipeline(model: str, revision: str | None, dtype: torch.dtype) -> Any:
    path = find_model(model)
    if revision is not None and Path(path).exists():
        raise InputError(
            f"`diffusion_revision` is {revision!r}, but `diffusion` is {model!r}, not of the Hub; leave it out."
        )
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()  # they count files, not the user's images
    transformers.utils.logging.disable_progress_bar()
    try:
        if Path(path).is_file():
            return _from_one_file(path, dtype)
        return diffusers.AutoPipelineForImage2Image.from_pretrained(
            path,
            revision=revision,
            dtype=dtype,
            use_safetensors=True,  # a pickled checkpoint can run code
            safety_checker=None,  # it blacks images out without a word
            requires_safety_checker=False,
        )
    except Exception as error:  # of all kinds, for a folder that is something else
        raise InputError(f"`diffusion` is {model!r}, which {why_unread(error)}.") from error


def _from_one_file(path: str, dtype: torch.dtype) -> Any:
    """Return the pipeline of a file of weights; what they are of, diffusers tells by their names."""
    import diffusers
    from diffusers.loaders import single_file_utils

    weights = single_file_utils.load_single_file_checkpoint(path)
    config = single_file_utils.fetch_diffusers_config(weights)["pretrained_model_name_or_path"]  # of the Hub
    kind = diffusers.DiffusionPipeline.load_config(config)["_class_name"]
    try:
        pipeline = getattr(diffusers, kind).from_single_file(path, config=config, dtype=dtype)
    except single_file_utils.SingleFileComponentError as error:
        raise ValueError(str(error).strip()) from error
    return diffusers.AutoPipelineForImage2Image.from_pipe(pipeline)


def _load_vae(name: str, own: Any) -> Any:
    import diffusers

    try:
        vae = diffusers.AutoModel.from_pretrained(name, dtype=own.dtype, use_safetensors=True)
    except Exception as error:  # of all kinds, for a folder that is something else
        raise InputError(f"`vae` is {name!r}, which is no loadable VAE: {first_line(error)}.") from error
    theirs, ours = vae.config.get("latent_channels"), own.config.latent_channels
    if theirs != ours:
        raise InputError(f"`vae` is {name!r}, of {theirs} latent channels; the model's has {ours}.")
    return vae


def find_model(model: str) -> str:
    """Return the folder, file or Hub id that a model's name stands for.

    Raises:
        InputError: where the name is none of ours, no folder or file of a model, and not of a Hub id's form.
    """
    if model in EMBEDDED:
        return str(ASSETS / model)
    model = os.path.expanduser(model)
    if Path(model).is_file():
        if Path(model).suffix != ".safetensors":
            raise InputError(
                f"`diffusion` is the file {model!r}; a file must be a .safetensors, which unlike a pickled checkpoint "
                "runs no code."
            )
        return model
    if Path(model).is_dir():
        if not (Path(model) / "model_index.json").is_file():
            raise InputError(
                f"`diffusion` is the folder {model!r}, which has no model_index.json: no diffusers pipeline."
            )
        return model
    if is_hub_id(model):
        return model
    known = ", ".join(EMBEDDED)
    raise InputError(
        f"`diffusion` is {model!r}: no model of ours ({known}), no folder or file, and no Hub id (owner/name)."
    )


def _add_lora(pipeline: Any, name: str) -> None:
    if importlib.util.find_spec("peft") is None:
        raise InputError(f"`lora` is {name!r}, which needs the package peft: `pip install peft`.")
    try:
        pipeline.load_lora_weights(name, use_safetensors=True)
    except Exception as error:  # of all kinds, for a file that is something else
        kind = type(pipeline).__name__
        raise InputError(f"`lora` is {name!r}, which is no LoRA of {kind}: {first_line(error)}.") from error
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()


def _make_scheduler(own: Any, name: str | None, options: dict[str, Any]) -> Any:
    import diffusers

    kind: Any = type(own)
    if name is not None:
        kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
        if kind is None:
            raise InputError(f"`scheduler` is {name!r}; name a diffusers class such as DDIMScheduler or PNDMScheduler.")
        try:
            flows = [hasattr(each, "scale_noise") for each in (kind, own)]  # rather than diffuses
        except ImportError as error:  # diffusers' stand-in
            raise InputError(f"`scheduler` is {name!r}: {' '.join(str(error).split())}") from error
        if flows[0] != flows[1]:
            raise InputError(
                f"`scheduler` is {name!r}, which is not of the kind of the model's own, {type(own).__name__}."
            )
    known = inspect.signature(kind.__init__).parameters
    for option in options:
        if option not in known:
            raise InputError(f"`scheduler_options` has {option!r}, which {kind.__name__} does not take.")
    # Schedulers made for pixels cut to [-1, 1] unless told otherwise, which a PNDM's configuration does not.
    unsaid = {"clip_sample": own.config.get("clip_sample", False)} if "clip_sample" in known else {}
    try:
        return kind.from_config(own.config, **unsaid | options)
    except Exception as error:  # of all kinds, by what each scheduler computes of them
        raise InputError(f"`scheduler_options` is {options}, which {kind.__name__} cannot use: {error}") from error


def model_digest(model: str) -> str:
    """Return a hash of a model's files, "" for one on the Hub, whose revision names it."""
    place = ASSETS / model if model in EMBEDDED else Path(model).expanduser()
    names = sorted(path.relative_to(place) for path in place.rglob("*")) if place.is_dir() else [Path()]
    parts = []
    for name in names:
        hidden = any(part.startswith(".") for part in name.parts)  # what Finder and downloads leave there
        if not hidden and (place / name).is_file():
            parts += [name.as_posix(), checksum(place / name)]
    return digest(parts) if parts else ""
