"""Live memory of a training step: measured, predicted without weights, and kept within a budget."""

from safe_lab.memory.budget import Stage, halved, is_out_of_memory, plan_stage
from safe_lab.memory.ledger import KINDS, Ledger, Pace, Trace
from safe_lab.memory.split import split_batch

__all__ = ["KINDS", "Ledger", "Pace", "Stage", "Trace", "halved", "is_out_of_memory", "plan_stage", "split_batch"]
