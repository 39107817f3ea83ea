"""All that decides a distilled set's content, besides the source."""

import dataclasses
import math

from d4m_plugin.errors import InputError
from d4m_plugin.sources import Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to distil. The defaults are the paper's (D4M, section 4.1 and supplement).

    Args:
        ipc: images per class to make.
        prototypes: clusters per class, a divisor of `ipc`; by default `ipc` below 100, else the largest divisor up
            to 50 (the paper finds 10 and 50 alike there).
        diffusion: the latent diffusion model: `digits` (embedded), a folder, or a Hub id; the source's by default.
        diffusion_revision: branch, tag or commit of a Hub id.
        strength: share of the noise schedule that a prototype is noised to, in (0, 1].
        guidance_scale: weight of classifier-free guidance, at least 0; 1 or less turns it off.
        num_inference_steps: steps of the whole schedule, of which int(steps · strength) are made.
        scheduler: a diffusers scheduler class, such as PNDMScheduler; the model's own by default.
        prompt: what the model is told, with `{name}` for the class name.
        negative_prompt: what it is led away from.
        resolution: edge in pixels that the model works at; the model's own by default.
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
    scheduler: str | None = None
    prompt: str = "{name}"
    negative_prompt: str = ""
    resolution: int | None = None
    image_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("ipc", "prototypes", "num_inference_steps", "resolution", "image_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"`{name}` is {value}; it must be at least 1.")
        if self.seed < 0:
            raise InputError(f"`seed` is {self.seed}; it must be at least 0.")
        if self.prototypes is not None and self.ipc % self.prototypes:
            divisors = ", ".join(str(d) for d in range(1, self.ipc + 1) if self.ipc % d == 0)
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
        if "{name}" not in self.prompt:
            raise InputError(f"`prompt` is {self.prompt!r}; it must contain {{name}}, for the class name.")

    def resolved(self, source: Source) -> "ResolvedRecipe":
        """Return the recipe with the source's defaults filled in."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(Recipe)}
        values["prototypes"] = self.prototypes or _default_prototypes(self.ipc)
        values["diffusion"] = self.diffusion or source.diffusion
        values["image_size"] = self.image_size or source.image_size
        return ResolvedRecipe(**values)

    @property
    def config_name(self) -> str:
        """The set's name beside others of its source: `ipc-10`."""
        return f"ipc-{self.ipc}"

    def prompt_of(self, name: str) -> str:
        """Return the prompt of a class."""
        return self.prompt.replace("{name}", name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedRecipe(Recipe):
    """A recipe whose prototypes, diffusion model and image size are known."""

    prototypes: int
    diffusion: str
    image_size: int


def _default_prototypes(ipc: int) -> int:
    if ipc < 100:
        return ipc
    return max(divisor for divisor in range(1, 51) if ipc % divisor == 0)
