"""Thin Lightning adapters: callbacks."""

from d4m_plugin.callbacks.run_progress import RunProgress
from d4m_plugin.callbacks.teacher_matching import TeacherMatching

__all__ = ["RunProgress", "TeacherMatching"]
