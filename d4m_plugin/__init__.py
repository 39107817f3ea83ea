"""Distil an image dataset with latent diffusion (D4M, arXiv:2407.15138) and train any Lightning model on it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d4m_plugin.callbacks import TeacherMatching
    from d4m_plugin.datamodules import D4MDataModule
    from d4m_plugin.diffusion import LatentDiffusion
    from d4m_plugin.distillation import distill
    from d4m_plugin.distilled import DistilledDataset
    from d4m_plugin.errors import InputError
    from d4m_plugin.models import ConvNet
    from d4m_plugin.models.classifier import ImageClassifier
    from d4m_plugin.recipe import Recipe
    from d4m_plugin.sources import CIFAR10, CIFAR100, Digits, HuggingFace, ImageFolder, ImageNet, Source, TinyImageNet
    from d4m_plugin.teachers import Teacher

# Where each public name lives. They are imported when first used: torch, lightning and diffusers take seconds.
_HOMES = {
    "CIFAR10": "sources",
    "CIFAR100": "sources",
    "ConvNet": "models",
    "D4MDataModule": "datamodules",
    "Digits": "sources",
    "DistilledDataset": "distilled",
    "HuggingFace": "sources",
    "ImageClassifier": "models.classifier",
    "ImageFolder": "sources",
    "ImageNet": "sources",
    "InputError": "errors",
    "LatentDiffusion": "diffusion",
    "Recipe": "recipe",
    "Source": "sources",
    "Teacher": "teachers",
    "TeacherMatching": "callbacks",
    "TinyImageNet": "sources",
    "distill": "distillation",
}
__all__ = [  # the names are there by __getattr__
    "CIFAR10",
    "CIFAR100",
    "ConvNet",
    "D4MDataModule",
    "Digits",
    "DistilledDataset",
    "HuggingFace",
    "ImageClassifier",
    "ImageFolder",
    "ImageNet",
    "InputError",
    "LatentDiffusion",
    "Recipe",
    "Source",
    "Teacher",
    "TeacherMatching",
    "TinyImageNet",
    "distill",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
