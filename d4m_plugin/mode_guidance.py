"""Mode guidance: denoising is pulled toward prototypes while the images' layout forms (MGD3, arXiv 2505.18963).

A step of a diffusers scheduler is handed what the model predicts, which stands for a clean latent: the prediction is
changed so that it stands for one nearer to the prototype, and the stock step does the rest, whichever scheduler it is.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from d4m_plugin.errors import InputError

Step = Callable[..., Any]


def pulled_toward(prototypes: Tensor, scheduler: Any, step: Step, scale: float, stop: float) -> Step:
    """Return a scheduler's step that pulls the clean latents that it is told of toward prototypes.

    At noise level s, the share of the noise in a latent's standard deviation, the predicted clean latent x becomes
    x + scale · s · (prototype - x). (MGD3's own form, in the posterior's variance, would vanish with DDIM.)

    Args:
        prototypes: where to, float32, of the shape of the latents that the scheduler gets.
        scheduler: of diffusers.
        step: the scheduler's own.
        scale: how far; 1 puts the prototype in the prediction's place where all is noise.
        stop: the share of the schedule, from the noise on, in which it pulls.

    Returns:
        The step, which raises InputError where the scheduler predicts in a way of its own, or the first step that is
        made comes after `stop`.
    """
    begun = False

    @functools.wraps(step)  # pipelines ask for its signature
    def pulled(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal begun
        first_free = int(stop * len(scheduler.timesteps))
        if first_free == len(scheduler.timesteps) or timestep > scheduler.timesteps[first_free]:
            model_output, begun = _pulled(model_output, timestep, sample, scheduler, prototypes, scale), True
        elif not begun:
            raise InputError(
                f"`mode_guidance_scale` is {scale}, but `strength` leaves no step before a `mode_guidance_stop` of "
                f"{stop}, so that none is pulled; raise one of them."
            )
        return step(model_output, timestep, sample, *args, **kwargs)

    return pulled


def _pulled(
    model_output: Tensor, timestep: Any, sample: Tensor, scheduler: Any, prototypes: Tensor, scale: float
) -> Tensor:
    """Return the prediction that stands for a clean latent nearer to the prototypes.

    Args:
        model_output: the prediction, after the guidance by the prompt.
        timestep: of the schedule.
        sample: the noisy latents, which are alpha · clean + sigma · noise.
        scheduler: what knows alpha, sigma and what a prediction stands for.
        prototypes: where to.
        scale: how far.
    """
    signal, noise = _levels(scheduler, timestep)
    whole = (signal**2 + noise**2) ** 0.5
    predicts = scheduler.config.get("prediction_type") or "flow_prediction"  # which flow matching has no word for
    x, output = sample.float(), model_output.float()
    slope: float  # of the output by the clean latent
    if hasattr(scheduler, "precondition_outputs"):  # EDM's, whatever it says that it predicts
        clean = scheduler.precondition_outputs(x, output, noise)
        slope = 1 / scheduler.precondition_outputs(0.0, 1.0, noise)
    elif predicts == "epsilon":
        clean, slope = (x - noise * output) / signal, -signal / noise
    elif predicts == "v_prediction":
        clean, slope = (signal * x / whole - noise * output) / whole, -whole / noise
    elif predicts == "flow_prediction":
        clean, slope = x - noise * output, -1 / noise
    elif predicts == "sample":
        clean, slope = output, 1.0
    else:
        raise InputError(
            f"`mode_guidance_scale` is {scale}, which models that predict {predicts!r} do not take; use 0."
        )
    shift: Tensor = scale * noise / whole * (prototypes - clean)
    return (output + slope * shift).to(model_output.dtype)


def _levels(scheduler: Any, timestep: Any) -> tuple[float, float]:
    """Return what clean latents and noise are multiplied by at a step, as the scheduler itself has them."""
    times = torch.as_tensor(timestep).reshape(1)
    one, none = torch.ones(1), torch.zeros(1)
    if hasattr(scheduler, "sigmas_interpol"):  # of KDPM2, whose every second pass is between the levels that it adds
        return 1.0, float(scheduler.scale_model_input(one, timestep) ** -2 - 1) ** 0.5
    if hasattr(scheduler, "scale_noise"):
        return float(scheduler.scale_noise(one, times, none)), float(scheduler.scale_noise(none, times, one))
    return float(scheduler.add_noise(one, none, times)), float(scheduler.add_noise(none, one, times))
