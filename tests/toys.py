"""Small stand-ins: a source of coloured squares, and a pipeline with random weights (plumbing, not quality)."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel

from d4m_plugin.pretraining import byte_tokenizer, text_config
from d4m_plugin.sources import Source


class Squares(Source):
    """Noisy squares of a colour by class, 16x16."""

    image_size = 16
    diffusion = "set by the test"

    def __init__(self, per_class: int = 6, classes: tuple[str, ...] = ("red", "green / blue", "ünï 🦆")) -> None:
        self.per_class, self.classes = per_class, classes

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.per_class} {self.classes}".encode()).hexdigest()

    def train(self):
        return _Squares(len(self.classes), self.per_class, seed=0)

    def test(self):
        return _Squares(len(self.classes), 4, seed=1)


class _Squares:
    def __init__(self, classes: int, per_class: int, seed: int) -> None:
        # The classes are interleaved, as in most datasets.
        self.targets = [label for _ in range(per_class) for label in range(classes)]
        noise = np.random.default_rng(seed).integers(0, 100, (len(self.targets), 16, 16, 3))
        colours = np.eye(classes, 3)[self.targets][:, None, None] * 150
        self.pixels = (noise + colours).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int):
        return Image.fromarray(self.pixels[index]), self.targets[index]


def save_random_pipeline(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = text_config(tokenizer, **sizes)
    StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            block_out_channels=[16, 16],
            norm_num_groups=8,
            latent_channels=4,
            sample_size=16,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
            block_out_channels=[16, 32],
            norm_num_groups=8,
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=2,
        ),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder
