"""safe_lab: Selective Adapter FrEezing (SAFE), and the laboratory around it.

The names below are the public ones; each loads its module when it is first used, so that importing safe_lab costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safe_lab.adapters import attach, base_weights, find_units
    from safe_lab.config import Config, load
    from safe_lab.decision import FreezingRule
    from safe_lab.folding import fold, unfold
    from safe_lab.freezing import Freezer, Scoring
    from safe_lab.importance import METRICS
    from safe_lab.memory import Ledger, Trace, split_batch
    from safe_lab.prefix import ActivationCache, Prefix
    from safe_lab.processes import Processes
    from safe_lab.replicas import Replicas
    from safe_lab.section import ConfigError
    from safe_lab.sharding import shard
    from safe_lab.units import Unit

_HOME = {
    "ActivationCache": "prefix",
    "Prefix": "prefix",
    "fold": "folding",
    "unfold": "folding",
    "attach": "adapters",
    "base_weights": "adapters",
    "find_units": "adapters",
    "Config": "config",
    "ConfigError": "section",
    "load": "config",
    "Freezer": "freezing",
    "FreezingRule": "decision",
    "Scoring": "freezing",
    "METRICS": "importance",
    "Processes": "processes",
    "Replicas": "replicas",
    "shard": "sharding",
    "Ledger": "memory",
    "Trace": "memory",
    "split_batch": "memory",
    "Unit": "units",
}

__all__ = [
    "METRICS",
    "ActivationCache",
    "Config",
    "ConfigError",
    "Freezer",
    "FreezingRule",
    "Ledger",
    "Prefix",
    "Processes",
    "Replicas",
    "Scoring",
    "Trace",
    "Unit",
    "attach",
    "base_weights",
    "find_units",
    "fold",
    "load",
    "shard",
    "split_batch",
    "unfold",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
