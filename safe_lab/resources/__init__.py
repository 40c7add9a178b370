"""What a run costs: seconds by activity, joules, live bytes and FLOPs."""

from safe_lab.resources.clock import ACTIVITIES, TRAINING, Clock, EnergyMeter
from safe_lab.resources.meter import FLOP_PHASES, Meter
from safe_lab.resources.together import combine, spread

__all__ = ["ACTIVITIES", "FLOP_PHASES", "TRAINING", "Clock", "EnergyMeter", "Meter", "combine", "spread"]
