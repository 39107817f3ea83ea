"""Real datasets: where the images to distil come from."""

from d4m_plugin.sources.base import LabelledImages, Source
from d4m_plugin.sources.cifar import CIFAR10, CIFAR100
from d4m_plugin.sources.digits import Digits
from d4m_plugin.sources.folders import ImageFolder, ImageNet, TinyImageNet
from d4m_plugin.sources.huggingface import HuggingFace

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "Digits",
    "HuggingFace",
    "ImageFolder",
    "ImageNet",
    "LabelledImages",
    "Source",
    "TinyImageNet",
]
