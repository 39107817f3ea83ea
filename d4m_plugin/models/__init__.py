"""Students: plain networks by name, and a LightningModule that trains one."""

from d4m_plugin.models.classifier import ImageClassifier
from d4m_plugin.models.convnet import ConvNet
from d4m_plugin.models.students import create_student

__all__ = ["ConvNet", "ImageClassifier", "create_student"]
