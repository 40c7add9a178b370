"""The layers below the frozen depth: run once a batch without a graph, or read from a cache."""

from safe_lab.prefix.cache import ActivationCache
from safe_lab.prefix.prefix import Prefix

__all__ = ["ActivationCache", "Prefix"]
