"""How fast is each stage beside the bare passes that it needs, and beside the authors' way?

    python benchmarks/speed.py
    python benchmarks/speed.py --pipeline sd --rows '[synthesis, authors, encoding]'

Ours and theirs take turns in one process, after a turn of each that does not count: a row is the median of the turns'
ratios, with the least and the most, which show the machine's noise. Above 1, ours is faster.
"""

import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli
from safetensors.torch import save
from sklearn.cluster import MiniBatchKMeans
from sklearn.datasets import load_sample_images
from sklearn.feature_extraction.image import extract_patches_2d
from torch import Tensor

from d4m_plugin import Digits, ImageFolder, LatentDiffusion, Recipe, distill
from d4m_plugin.devices import autocast
from d4m_plugin.distilled import png
from d4m_plugin.encoding import encode
from d4m_plugin.prototypes import BATCH_SIZE, START_SIZE, Prototypes, cluster
from d4m_plugin.seeding import generator_of
from d4m_plugin.synthesis import synthesise

CLASSES, IPC = 10, 10
FILES = 5000  # encoded
BATCHES = (10, 25, 50, 100)  # of which the bare passes get the best
OF_A_CLASS = (1300, 4, 64, 64)  # latents: ImageNet at 512 pixels

Turn = Callable[[], Any]


class Setting:
    """A pipeline and a recipe, and what the bare passes need of them.

    Args:
        pipeline: `digits` or `cifar10`, or `sd`, which has Stable Diffusion 1.5's shape and random weights.
        folder: for what a row writes.
    """

    def __init__(self, pipeline: str, folder: Path) -> None:
        self.folder = folder
        self.ipc, self.files = (2, 500) if pipeline == "sd" else (IPC, FILES)
        self.diffusion = save_sd_shaped(folder / "sd") if pipeline == "sd" else pipeline
        self.model = LatentDiffusion(self.diffusion)
        self.recipe = Recipe(ipc=self.ipc, diffusion=self.diffusion).resolved(Digits())
        self.names = Digits().classes
        edge = self.model.resolution // self.model.pipeline.vae_scale_factor
        self.latents = torch.randn(CLASSES * self.ipc, 4, edge, edge, generator=generator_of(0))
        self.wanted = [(label, index) for label in range(CLASSES) for index in range(self.ipc)]

    @cached_property
    def photographs(self) -> ImageFolder:
        """Files of the model's resolution."""
        pixels = torch.randint(0, 256, (16, 3, self.model.resolution, self.model.resolution), dtype=torch.uint8)
        files = [png(each) for each in pixels]
        for number in range(self.files * 5 // 4):  # a fifth of them are set apart as test images
            place = self.folder / "photographs" / f"class {number % CLASSES}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}.png").write_bytes(files[number % 16])
        return ImageFolder(self.folder / "photographs")

    @cached_property
    def best_batch(self) -> int:
        """Images a pass at which bare denoising is fastest."""

        def an_image(size: int) -> float:
            _, *seconds = [seconds_of(partial(self.denoise_bare, size, 2)) for _ in range(4)]
            return min(seconds) / size

        return min(BATCHES, key=an_image)

    def bring(self) -> None:
        """Have what the stock pipeline calls on the device, where ours take turns."""
        for part in (self.model.pipeline.text_encoder, self.model.pipeline.unet):
            part.to(self.model.device)

    def denoise_bare(self, size: int, steps: int) -> None:
        """Run the denoiser alone, both halves of guidance in a pass."""
        pipeline, model = self.model.pipeline, self.model
        self.bring()
        latents = self.latents[:1].expand(2 * size, *self.latents.shape[1:])
        text = pipeline.encode_prompt("0", model.device, 1, False)[0].expand(2 * size, -1, -1)
        with torch.inference_mode(), autocast(model.device, model.dtype):
            for step in range(steps):
                pipeline.unet(latents.to(model.device), torch.tensor(step), text)

    def synthesise_bare(self) -> None:
        """Run the passes that a set needs."""
        for start in range(0, len(self.wanted), self.best_batch):
            size = min(self.best_batch, len(self.wanted) - start)
            self.denoise_bare(size, self.model.steps_of(self.recipe.num_inference_steps, self.recipe.strength))
            self.decode_bare(self.latents[:size])

    @torch.inference_mode()
    def decode_bare(self, latents: Tensor) -> None:
        """Run the VAE's decoder alone, as many at once as we do: more are no faster."""
        for few in latents.split(max(1, 2**20 // self.model.resolution**2)):
            with autocast(self.model.device, self.model.dtype):
                self.model.pipeline.vae.decode(few.to(self.model.device))

    @torch.inference_mode()
    def encode_bare(self, count: int) -> None:
        """Run the VAE's encoder alone, on pixels in memory."""
        pixels = torch.rand(50, 3, self.model.resolution, self.model.resolution, device=self.model.device)
        for _ in range(0, count, 50):
            with autocast(self.model.device, self.model.dtype):
                self.model.pipeline.vae.encode(pixels)

    def synthesise_ours(self) -> None:
        """Make a set's images, from given prototypes."""
        found = {
            label: Prototypes(latents, torch.full([self.ipc], 1 / self.ipc))
            for label, latents in enumerate(self.latents.split(self.ipc))
        }
        for start in range(0, len(self.wanted), 50):
            synthesise(self.wanted[start : start + 50], found, self.names, self.recipe, self.model)

    def synthesise_as_the_authors(self) -> None:
        """Make them by a call of the stock pipeline for each, its prompt given as text."""
        self.model.pipeline.set_progress_bar_config(disable=True)
        self.bring()
        for latents, (label, index) in zip(self.latents, self.wanted, strict=True):
            with autocast(self.model.device, self.model.dtype):
                self.model.pipeline(
                    prompt=self.names[label],
                    image=latents[None].to(self.model.device),
                    strength=self.recipe.strength,
                    guidance_scale=self.recipe.guidance_scale,
                    num_inference_steps=self.recipe.num_inference_steps,
                    generator=generator_of(0, label, index),
                )

    def encode_ours(self) -> None:
        """Encode files."""
        images = self.photographs.train()
        for _ in encode(images, range(CLASSES), self.model, self.model.resolution):
            pass


def synthesis(setting: Setting) -> tuple[Turn, Turn]:
    """Synthesis, beside its bare passes in the best batch."""
    return setting.synthesise_ours, setting.synthesise_bare


def authors(setting: Setting) -> tuple[Turn, Turn]:
    """Synthesis, beside one call of the stock pipeline an image."""
    return setting.synthesise_ours, setting.synthesise_as_the_authors


def encoding(setting: Setting) -> tuple[Turn, Turn]:
    """Encoding of files, beside bare passes on as many images in memory."""
    count = len(setting.photographs.train())
    return setting.encode_ours, partial(setting.encode_bare, count)


def prototypes(k: int, setting: Setting) -> tuple[Turn, Turn]:
    """Prototypes of a class, beside the authors' `partial_fit` on chunks of k latents in float64.

    In place of latents, parts of scikit-learn's photographs, in colour and grey.
    """
    count, _, *edges = OF_A_CLASS
    photographs = load_sample_images().images
    patches = [extract_patches_2d(each, edges, max_patches=count // 2, random_state=1) for each in photographs]
    colour = torch.from_numpy(np.concatenate(patches)).permute(0, 3, 1, 2) / 127.5 - 1
    latents = torch.cat([colour, colour.mean(1, keepdim=True)], 1)
    points = latents.flatten(1).numpy()

    def as_the_authors() -> Callable[[], float]:
        means = MiniBatchKMeans(k, random_state=0)
        doubles = points.astype(np.float64)
        for start in range(0, len(points) - k + 1, k):
            means.partial_fit(doubles[start : start + k])
        return partial(inertia, points, means.cluster_centers_)

    def ours() -> Callable[[], float]:
        return partial(inertia, points, cluster(latents, k, seed=0).latents.flatten(1).numpy())

    return ours, as_the_authors


def inertia(points: np.ndarray, centres: np.ndarray) -> float:
    """Return the mean squared distance of points to their nearest centres."""
    a, b = torch.from_numpy(points), torch.as_tensor(centres, dtype=torch.float32)
    return float(torch.cdist(a, b).amin(1).square().mean())


def whole(setting: Setting) -> tuple[Turn, Turn]:
    """All of `distill`, beside the sum of its bare parts."""
    source = setting.photographs
    recipe = Recipe(ipc=setting.ipc, diffusion=setting.diffusion)
    latents = torch.randn(setting.files // CLASSES, *setting.latents.shape[1:]).flatten(1).numpy()

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            distill(source, recipe, output=Path(folder) / "set", cache_dir=folder)

    def bare() -> None:
        LatentDiffusion(setting.diffusion)
        setting.encode_bare(setting.files)
        for _ in range(CLASSES):
            means = MiniBatchKMeans(setting.ipc, batch_size=BATCH_SIZE, init_size=START_SIZE, n_init=1, random_state=0)
            means.fit(latents)
        setting.synthesise_bare()

    return ours, bare


def start(setting: Setting) -> tuple[Turn, Turn]:
    """`lightning fit` on a finished set of files to its first step and end, beside `import torch, lightning`.

    The files are the digits, so that the embedded teacher knows them; `Digits` itself would import scikit-learn.
    """
    root, digits = setting.folder / "files", Digits()
    for split, images in (("train", digits.train()), ("test", digits.test())):
        for number in range(len(images)):
            image, label = images[number]
            place = root / split / digits.classes[label]
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{number}.png")
    made = distill(ImageFolder(root), Recipe(ipc=IPC, diffusion="digits"), output=setting.folder / "set")
    fit = ["-m", "d4m_plugin", "fit", "--data.set_folder", str(made.root), "--trainer.max_steps", "1"]
    fit += ["--data.source", "ImageFolder", "--data.source.root", str(root), "--matching.teacher", "digits"]
    fit += ["--trainer.limit_val_batches", "0", "--trainer.limit_test_batches", "0", "--trainer.logger", "false"]
    fit += ["--trainer.default_root_dir", str(setting.folder)]  # where its checkpoint goes
    return partial(python, *fit), partial(python, "-c", "import torch, lightning")


def told(setting: Setting) -> tuple[Turn, Turn]:
    """`d4m --help`, beside `python -c pass`."""
    return partial(python, "-m", "d4m_plugin", "--help"), partial(python, "-c", "pass")


def imported(setting: Setting) -> tuple[Turn, Turn]:
    """`import d4m_plugin`, beside `python -c pass`."""
    return partial(python, "-c", "import d4m_plugin"), partial(python, "-c", "pass")


def disk(setting: Setting) -> tuple[Turn, Turn]:
    """Bytes of prototypes, beside the authors' JSON; not seconds."""
    found = torch.randn(IPC, *OF_A_CLASS[1:], generator=generator_of(0))
    as_json = json.dumps({"0": found.flatten(1).tolist()})
    as_stored = save({"0.latents": found.half()})
    return lambda: len(as_stored), lambda: len(as_json)


ROWS: dict[str, Callable[[Setting], tuple[Turn, Turn]]] = {
    "synthesis": synthesis,
    "authors": authors,
    "encoding": encoding,
    "prototypes-10": partial(prototypes, 10),
    "prototypes-50": partial(prototypes, 50),
    "whole": whole,
    "start": start,
    "help": told,
    "import": imported,
    "disk": disk,
}


def python(*words: str) -> None:
    """Run Python, quietly."""
    subprocess.run([sys.executable, *words], check=True, capture_output=True)


def seconds_of(turn: Turn) -> float:
    """Return the seconds of a turn."""
    began = time.perf_counter()
    turn()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - began


def measured(name: str, setting: Setting, turns: int) -> dict[str, Any]:
    """Return a row: medians of both, and of the ratios of the turns, with the least and the most."""
    ours, theirs = ROWS[name](setting)
    value = (lambda turn: turn()) if name == "disk" else seconds_of
    with redirect_stderr(io.StringIO()):  # progress
        kept = {"inertia": round(ours()() / theirs()(), 3)} if name.startswith("prototypes") else {}
        for turn in (ours, theirs):
            turn()
        pairs = [(value(ours), value(theirs)) for _ in range(turns)]
    ratios = [b / a for a, b in pairs]
    return {
        "row": name,
        "ours": round(statistics.median(a for a, _ in pairs), 3),
        "theirs": round(statistics.median(b for _, b in pairs), 3),
        "ratio": round(statistics.median(ratios), 3),
        "least": round(min(ratios), 3),
        "most": round(max(ratios), 3),
    } | kept


def save_sd_shaped(folder: Path) -> str:
    """Save a pipeline of Stable Diffusion 1.5's shape, a tenth as wide, of 128 pixels, with random weights."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    from d4m_plugin.pretraining import byte_tokenizer, text_config

    tokenizer = byte_tokenizer()
    blocks = 4
    StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * blocks,
            up_block_types=["UpDecoderBlock2D"] * blocks,
            block_out_channels=[32, 64, 128, 128],
            layers_per_block=2,
            latent_channels=4,
            sample_size=128,
        ),
        unet=UNet2DConditionModel(
            sample_size=16, block_out_channels=(32, 64, 128, 128), attention_head_dim=8, cross_attention_dim=128
        ),
        text_encoder=CLIPTextModel(
            text_config(tokenizer, hidden_size=128, intermediate_size=512, num_hidden_layers=12, num_attention_heads=8)
        ),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return str(folder)


def main(pipeline: str = "cifar10", rows: tuple[str, ...] = tuple(ROWS), turns: int = 5) -> None:
    """Measure rows, and print each as it is done.

    Args:
        pipeline: `digits`, `cifar10`, or `sd`: Stable Diffusion 1.5's shape, a tenth as wide.
        rows: of the table.
        turns: of ours and of theirs.
    """
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(pipeline, Path(folder))
        for name in rows:
            print(json.dumps({"pipeline": pipeline} | measured(name, setting, turns)), flush=True)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
