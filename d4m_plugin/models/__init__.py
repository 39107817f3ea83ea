"""Students: plain networks by name; `classifier` has the LightningModule that trains one."""

from d4m_plugin.models.convnet import ConvNet
from d4m_plugin.models.students import create_student

__all__ = ["ConvNet", "create_student"]
