"""sdar_verl: self-distilled agentic reinforcement learning (SDAR, arXiv:2605.15155) as a plugin of stock verl."""

from sdar_verl._version import __version__

__all__ = ["__version__"]
