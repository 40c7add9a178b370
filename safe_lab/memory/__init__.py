"""Live memory of a training step: measured, and predicted without weights."""

from safe_lab.memory.ledger import KINDS, Ledger, Trace

__all__ = ["KINDS", "Ledger", "Trace"]
