"""`python -m d4m_plugin`."""

from d4m_plugin.cli import d4m

if __name__ == "__main__":
    d4m()
