"""What a run will cost, before it is started: ``safe-lab plan``."""

from safe_lab.plan.fit import Fit, find_fit
from safe_lab.plan.rows import Plan, Row, plan

__all__ = ["Fit", "Plan", "Row", "find_fit", "plan"]
