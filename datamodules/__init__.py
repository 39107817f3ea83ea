"""The package's data modules, at the top level of the repository; see README.md."""

from d4m_plugin.datamodules import D4MDataModule

__all__ = ["D4MDataModule"]
