"""Thin Lightning adapters: data modules."""

from d4m_plugin.datamodules.d4m import D4MDataModule

__all__ = ["D4MDataModule"]
