"""Real datasets: where the images to distil come from."""

from d4m_plugin.sources.base import LabelledImages, Source
from d4m_plugin.sources.digits import Digits

__all__ = ["Digits", "LabelledImages", "Source"]
