"""The trainings of a latent diffusion pipeline's parts: steps that resume to the byte."""

import contextlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning as L
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from d4m_plugin.devices import default_device
from d4m_plugin.errors import InputError, InputWarning, first_line
from d4m_plugin.one_process import diverged, fit, own_trainer
from d4m_plugin.seeding import seed_of

KL_WEIGHT = 1e-6  # Rombach et al., appendix G: only to keep the latents' scale bounded
PROMPT_DROPOUT = 0.1  # Ho and Salimans, section 4
SNR_CLAMP = 5.0  # gamma of Hang et al., arXiv:2303.09556
STEPS_A_CHECKPOINT = 500  # a killed run starts again from the last one


class _Rows:
    """Tensors of as many rows each, which the copy of a module that holds them shares."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors

    def __deepcopy__(self, memo: object) -> "_Rows":
        return self


class Training(L.LightningModule):
    """Trains on batches that each step draws for itself, with replacement.

    Batch and noise depend on the seed and the step's number alone, so a run that resumes goes on as if it had not
    been stopped, which no state of a loader would give.

    Attributes:
        slow: the parts that take the time, which are worth compiling.
    """

    slow: tuple[nn.Module, ...]

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
        numbers = range(self.trainer.max_steps)
        return DataLoader(numbers, batch_size=None)  # type: ignore[arg-type]  # typed for a Dataset, whose methods it has

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


class AutoencoderTraining(Training):
    """Trains an `AutoencoderKL` to reconstruct images, uint8 (N, 3, H, W): L1 and L2 loss and a little KL."""

    def __init__(self, vae: AutoencoderKL, images: Tensor, batch_size: int, lr: float, seed: int) -> None:
        super().__init__([images], batch_size, lr, seed)
        self.vae, self.slow = vae, (vae.encoder, vae.decoder)

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


class DenoiserTraining(Training):
    """Trains a U-Net and its text encoder to predict the velocity of noised latents.

    Velocity (Salimans and Ho, arXiv:2202.00512): v = sqrt(ᾱ) ε - sqrt(1 - ᾱ) x0, better behaved than ε at high
    noise, where guided synthesis starts. Its error is weighted by min(SNR, 5) / (SNR + 1) (Hang et al.,
    arXiv:2303.09556), so that nearly clean latents, of which there is little to learn, do not lead.
    """

    prompt_ids: Tensor

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        prompt_ids: Tensor,
        tensors: tuple[Tensor, Tensor],
        batch_size: int,
        lr: float,
        seed: int,
    ) -> None:
        """Take `prompt_ids`, int64 (classes + 1, 77), whose last row is the empty prompt, and latents and labels."""
        super().__init__(tensors, batch_size, lr, seed)
        self.unet, self.text_encoder = pipeline.unet, pipeline.text_encoder
        self.scheduler, self.slow = pipeline.scheduler, (pipeline.unet,)
        self.register_buffer("prompt_ids", prompt_ids, persistent=False)

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


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is there; one that cannot be read is told."""
    try:
        torch.load(checkpoint, "cpu", weights_only=True)
    except FileNotFoundError:
        return False
    except (EOFError, RuntimeError, UnpicklingError) as error:
        warnings.warn(
            f"{str(checkpoint)!r} is damaged ({first_line(error)}); it is not gone on from.", InputWarning, stacklevel=2
        )
        return False
    return True


def train(module: Training, steps: int, callbacks: list[L.Callback], checkpoint: Path, compiled: bool) -> None:
    """Make exactly `steps` updates, from `checkpoint` on where there is one.

    Raises:
        InputError: where the training diverged.
    """
    for part in module.slow if compiled else ():
        part.compile()  # in place: the names of the weights stay
    kept = _CheckpointOnTheWay(
        checkpoint.parent, checkpoint.stem, every_n_train_steps=STEPS_A_CHECKPOINT, enable_version_counter=False
    )
    # A gather of prompts would else add its gradients in any order.
    trainer = own_trainer(steps, [*callbacks, kept], deterministic="warn")
    # On a CPU the flash kernel's backward takes a fifth of the step at these lengths; the plain one is faster.
    plain = sdpa_kernel(SDPBackend.MATH) if default_device().type == "cpu" else contextlib.nullcontext()
    with plain, warnings.catch_warnings():
        for expected in ("Checkpoint directory .* exists and is not empty", "You're resuming from a checkpoint that"):
            warnings.filterwarnings("ignore", expected)  # as after a kill; no step depends on the loader
        fit(trainer, module, ckpt_path=checkpoint if _is_whole(checkpoint) else None)
    module.cpu().eval()
    if diverged(module):
        raise InputError("the training diverged, and its weights are no numbers; lower `vae_lr` or `unet_lr`.")
