"""All that decides a distilled set's content, besides the source."""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from d4m_plugin.checking import check_fields, check_least, fault_of, shown
from d4m_plugin.errors import InputError
from d4m_plugin.sources import Source
from d4m_plugin.sources.images import Resize

MODELS = ("diffusion", "vae", "lora", "teacher")  # options that may name folders and files
MOST_LISTED = 1000  # the largest divisor that an error names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to distil. The defaults are the paper's (D4M, section 4.1 and supplement).

    Args:
        ipc: images per class to make.
        prototypes: clusters per class, a divisor of `ipc`; by default `ipc`, or from 100 on the largest divisor from 10
            to 50 where there is one (the paper finds 10 and 50 alike there).
        diffusion: the latent diffusion model: `digits` or `cifar10` (embedded), a folder, a `.safetensors` file of a
            whole model, or a Hub id; the source's by default.
        diffusion_revision: branch, tag or commit of a Hub id.
        strength: share of the noise schedule that a prototype is noised to, in (0, 1].
        guidance_scale: weight of classifier-free guidance, at least 0; 1 or less turns it off.
        num_inference_steps: steps of the whole schedule, of which the share `strength` is made; of an LCM, all.
        mode_guidance_scale: how far each step is pulled back to its prototype (MGD3), at least 0; 0, the paper's, is
            off, and 0.1 goes with a `strength` of 1, which all but forgets the prototype.
        mode_guidance_stop: share of the schedule, from the noise on, in which it pulls, in (0, 1]; of an LCM, of the
            steps that are made.
        oversample: images that are made for each that is kept, at least 1, from noises of their own; `teacher` keeps
            the one that it is surest of.
        teacher: who chooses, where `oversample` is above 1, as TeacherMatching takes it; `auto` by default.
        vae: a folder or Hub id of a VAE for the same latents in place of the model's, such as a tiny one
            (`madebyollin/taesd`), which encodes many times faster and less faithfully.
        lora: a folder, file or Hub id of LoRA weights that are added to the model's (needs the package peft).
        scheduler: a diffusers scheduler class, such as PNDMScheduler; the model's own by default.
        scheduler_options: of the scheduler, such as `use_karras_sigmas: true`.
        prompt: what the model is told, with `{name}` for the class name.
        class_names: what the prompt says for a class in place of its name: a mapping from names or label numbers, or
            a YAML or JSON file of one.
        negative_prompt: what it is led away from, under a `guidance_scale` above 1.
        resolution: edge in pixels that the model works at; the model's own by default.
        resize: how real images that are not square become so: `crop` cuts the middle out, `squash` (the authors' way)
            changes the shape.
        max_images_per_class: real images of a class to encode, drawn by `seed`; all by default.
        image_size: edge in pixels of the images that are kept; the source's by default.
        seed: decides the clustering and the noise.

    Raises:
        InputError: where a value cannot work.
    """

    ipc: int = 10
    prototypes: int | None = None
    diffusion: str | None = None
    diffusion_revision: str | None = None
    strength: float = 0.7
    guidance_scale: float = 8.0
    num_inference_steps: int = 50
    mode_guidance_scale: float = 0.0
    mode_guidance_stop: float = 0.5
    oversample: int = 1
    teacher: str | None = None
    vae: str | None = None
    lora: str | None = None
    scheduler: str | None = None
    scheduler_options: dict[str, Any] | None = None
    prompt: str = "{name}"
    class_names: dict[str, str] | str | None = None
    negative_prompt: str = ""
    resolution: int | None = None
    resize: Resize = "crop"
    max_images_per_class: int | None = None
    image_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.class_names is not None:
            object.__setattr__(self, "class_names", _read_names(self.class_names))
        check_fields(self)
        for name in MODELS:
            if value := getattr(self, name):
                object.__setattr__(self, name, os.path.expanduser(value))
        check_least(
            1,
            ipc=self.ipc,
            prototypes=self.prototypes,
            num_inference_steps=self.num_inference_steps,
            oversample=self.oversample,
            resolution=self.resolution,
            max_images_per_class=self.max_images_per_class,
            image_size=self.image_size,
        )
        check_least(0, seed=self.seed)
        if self.prototypes is not None and self.ipc % self.prototypes:
            divisors = ", ".join(str(d) for d in range(1, min(self.ipc, MOST_LISTED) + 1) if self.ipc % d == 0)
            raise InputError(
                f"`prototypes` is {self.prototypes}, which does not divide `ipc`, {self.ipc}; use one of {divisors}."
            )
        if not 0 < self.strength <= 1:
            raise InputError(f"`strength` is {self.strength}; it must be above 0 and at most 1.")
        if self.num_inference_steps * self.strength < 1:
            raise InputError(
                f"`num_inference_steps` is {self.num_inference_steps} and `strength` {self.strength}, which leaves no "
                f"step to make; use at least {math.ceil(1 / self.strength)} steps."
            )
        if not 0 <= self.guidance_scale < math.inf:
            raise InputError(
                f"`guidance_scale` is {self.guidance_scale}; it must be at least 0 (1 turns guidance off)."
            )
        if self.negative_prompt and self.guidance_scale <= 1:
            raise InputError(
                f"`negative_prompt` is {self.negative_prompt!r}, which a `guidance_scale` of {self.guidance_scale} "
                "leaves out; raise that above 1, or leave the prompt out."
            )
        if not 0 <= self.mode_guidance_scale < math.inf:
            raise InputError(f"`mode_guidance_scale` is {self.mode_guidance_scale}; it must be at least 0 (off).")
        if not 0 < self.mode_guidance_stop <= 1:
            raise InputError(f"`mode_guidance_stop` is {self.mode_guidance_stop}; it must be above 0 and at most 1.")
        if self.teacher is not None and self.oversample == 1:
            raise InputError(
                f"`teacher` is {self.teacher!r}, but `oversample` is 1, which leaves it nothing to choose from; the "
                "teacher of a training is that of `matching`."
            )
        if "{name}" not in self.prompt:
            raise InputError(f"`prompt` is {self.prompt!r}; it must contain {{name}}, for the class name.")

    def resolved(self, source: Source) -> "ResolvedRecipe":
        """Return the recipe with the source's defaults filled in.

        Raises:
            InputError: where `class_names` names a class that the source has not.
        """
        assert not isinstance(self.class_names, str)  # __post_init__ read the file
        known = {*source.classes, *map(str, range(len(source.classes)))}
        names = self.class_names or {}
        for name in names:
            if name not in known:
                raise InputError(f"`class_names` has {name!r}, which is no class of {source.name} and no label number.")
        defaults = {
            "prototypes": self.prototypes or _default_prototypes(self.ipc),
            "class_names": names,
            "diffusion": self.diffusion or source.diffusion,
            "teacher": (self.teacher or "auto") if self.oversample > 1 else None,
            "image_size": self.image_size or source.image_size,
        }
        return ResolvedRecipe(**vars(self) | defaults)

    @property
    def config_name(self) -> str:
        """The set's name beside others of its source: `ipc-10`."""
        return f"ipc-{self.ipc}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedRecipe(Recipe):
    """A recipe whose prototypes, diffusion model and image size are known."""

    prototypes: int
    diffusion: str
    class_names: dict[str, str]
    image_size: int

    def __post_init__(self) -> None:
        check_fields(self)  # before a file is read: a stranger's recipe names none
        super().__post_init__()

    def prompts(self, classes: Sequence[str]) -> list[str]:
        """Return the prompt of each class."""
        by_number = {key: name for key, name in self.class_names.items() if key not in classes}
        names = [self.class_names.get(name, by_number.get(str(n), name)) for n, name in enumerate(classes)]
        return [self.prompt.replace("{name}", name) for name in names]


def _read_names(given: dict[Any, Any] | str) -> dict[str, str]:
    """Return the mapping that is given or that a file holds, sorted, so that equal ones make equal recipes."""
    names: Any = given
    option = f"`class_names` is {shown(given)}, which"
    if isinstance(given, str):
        try:
            # A mapping whose values are no names comes as text, too.
            is_mapping = given.lstrip().startswith("{")
            names = yaml.safe_load(given if is_mapping else Path(given).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
            raise InputError(f"{option} cannot be read ({reason}).") from error
    if fault := fault_of(names, dict[str | int, str | int], "it"):
        raise InputError(f"{option} holds no mapping from class names to names: {fault}.")
    return dict(sorted((str(name), str(value)) for name, value in names.items()))


def _default_prototypes(ipc: int) -> int:
    few = [divisor for divisor in range(10, 51) if ipc % divisor == 0]
    return max(few) if ipc >= 100 and few else ipc
