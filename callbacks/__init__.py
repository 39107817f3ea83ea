"""The package's callbacks, at the top level of the repository; see README.md."""

from d4m_plugin.callbacks import RunProgress, TeacherMatching

__all__ = ["RunProgress", "TeacherMatching"]
