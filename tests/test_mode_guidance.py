"""Mode guidance against closed forms: where all data are one Gaussian, what a perfect model predicts is known."""

from itertools import pairwise

import diffusers
import pytest
import torch

from d4m_plugin.mode_guidance import pulled_toward

MEAN, VARIANCE = 0.3, 0.25  # of the data
PROTOTYPES = torch.tensor([[-1.0], [0.0], [2.0]])
NOISE = torch.tensor([[0.5], [-1.0], [0.1]])
STEPS = 20
KINDS = [
    ("DDIMScheduler", "epsilon"),
    ("DDIMScheduler", "v_prediction"),
    ("DDIMScheduler", "sample"),
    ("EulerDiscreteScheduler", "epsilon"),
    ("EulerDiscreteScheduler", "v_prediction"),
    ("DPMSolverMultistepScheduler", "epsilon"),
    ("EDMEulerScheduler", "epsilon"),
    ("EDMEulerScheduler", "v_prediction"),
    ("EDMDPMSolverMultistepScheduler", "epsilon"),
    ("FlowMatchEulerDiscreteScheduler", None),
]


def scheduler_of(kind, predicts):
    options = {"prediction_type": predicts} if predicts else {}
    if predicts and not kind.startswith("EDM"):
        options |= {"beta_schedule": "scaled_linear"}
    if kind == "DDIMScheduler":
        options |= {"clip_sample": False, "set_alpha_to_one": False}
    if kind.endswith("DPMSolverMultistepScheduler"):
        options |= {"solver_order": 1}  # which is DDIM
    scheduler = getattr(diffusers, kind)(**options)
    scheduler.set_timesteps(STEPS)
    return scheduler


def levels_of(scheduler):
    """Signal and noise of each step and of the end, from the scheduler's own tables."""
    if hasattr(scheduler, "scale_noise"):
        return [(1 - sigma, sigma) for sigma in scheduler.sigmas.double()]
    if hasattr(scheduler, "sigmas_interpol"):  # every second pass is at one of these
        levels = zip(scheduler.sigmas[::2], scheduler.sigmas_interpol[1::2], strict=True)
        return [(torch.ones(()).double(), sigma.double()) for both in levels for sigma in both]
    if isinstance(scheduler, diffusers.DDIMScheduler):
        shares = [*scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod]
        return [(share.double() ** 0.5, (1 - share.double()) ** 0.5) for share in shares]
    if not isinstance(scheduler, diffusers.DPMSolverMultistepScheduler):
        return [(torch.ones(()).double(), sigma) for sigma in scheduler.sigmas.double()]
    return [(1 / (1 + s * s) ** 0.5, s / (1 + s * s) ** 0.5) for s in scheduler.sigmas.double()]


def clean_of(x, signal, noise):
    """What a perfect model predicts: the posterior's mean."""
    return MEAN + signal * VARIANCE / (signal**2 * VARIANCE + noise**2) * (x - signal * MEAN)


def by_the_scheduler(scheduler, predicts, scale, stop):
    levels = levels_of(scheduler)
    x = NOISE * levels[0][1].float() + PROTOTYPES * levels[0][0].float()
    step = pulled_toward(PROTOTYPES, scheduler, scheduler.step, scale, stop)
    for time, (signal, noise) in zip(scheduler.timesteps, levels, strict=False):
        scheduler.scale_model_input(x, time) if predicts else None
        clean = clean_of(x.double(), signal, noise)
        epsilon, whole = (x.double() - signal * clean) / noise, (signal**2 + noise**2) ** 0.5
        output = {
            "epsilon": epsilon,
            "sample": clean,
            "v_prediction": (signal * epsilon - noise * clean) / whole,
            None: epsilon - clean,
        }[predicts]
        if hasattr(scheduler, "precondition_outputs"):
            none, one = (scheduler.precondition_outputs(x.double(), each, noise) for each in (0, 1))
            output = (clean - none) / (one - none)
        x = step(output.float(), time, x, return_dict=False)[0]
    return x


def in_closed_form(levels, scale, stop):
    """DDIM, which all of these are for one clean latent and its noise, in double precision."""
    x = NOISE.double() * levels[0][1] + PROTOTYPES * levels[0][0]
    for step, ((signal, noise), (next_signal, next_noise)) in enumerate(pairwise(levels)):
        clean = clean_of(x, signal, noise)
        if step < stop * (len(levels) - 1):
            clean = clean + scale * noise / (signal**2 + noise**2) ** 0.5 * (PROTOTYPES - clean)
        x = next_signal * clean + next_noise * (x - signal * clean) / noise
    return x.float()


@pytest.mark.parametrize(("scale", "stop"), [(0.1, 0.5), (0.5, 1.0), (0.0, 0.5)])
@pytest.mark.parametrize(("kind", "predicts"), KINDS)
def test_each_scheduler_gives_the_closed_form(kind, predicts, scale, stop):
    found = by_the_scheduler(scheduler_of(kind, predicts), predicts, scale, stop)
    torch.testing.assert_close(
        found, in_closed_form(levels_of(scheduler_of(kind, predicts)), scale, stop), atol=2e-3, rtol=1e-3
    )


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # KDPM2, of torch's tensors in numpy
@pytest.mark.parametrize("kind", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_a_second_order_scheduler_is_near_to_a_thousand_steps(kind):
    """As it is not where one of its passes is pulled by the noise of another."""
    scheduler = scheduler_of(kind, "epsilon")
    scheduler.set_timesteps(100)
    first, last = scheduler.sigmas[0], scheduler.sigmas[scheduler.sigmas > 0][-1]
    sigmas = [*torch.logspace(first.log10(), last.log10(), 1000).double(), torch.zeros(()).double()]
    expected = in_closed_form([(torch.ones(()).double(), sigma) for sigma in sigmas], 0.5, 1.0)
    torch.testing.assert_close(by_the_scheduler(scheduler, "epsilon", 0.5, 1.0), expected, atol=4e-3, rtol=0)


def test_it_brings_images_nearer_to_their_prototypes_and_pulling_longer_nearer_still():
    def distance(scale, stop):
        found = by_the_scheduler(scheduler_of("DDIMScheduler", "epsilon"), "epsilon", scale, stop)
        return float((found - PROTOTYPES).abs().mean())

    assert distance(0.0, 0.5) > distance(0.1, 0.5) > distance(0.1, 1.0) > distance(0.5, 1.0)
