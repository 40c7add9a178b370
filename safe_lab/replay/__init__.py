"""Replay: from what a run has recorded, without training, when other schedules would have frozen what, and at what cost."""

from safe_lab.replay.costs import CostModel, forecast_peak
from safe_lab.replay.history import History, Moment, check_replayable, replay_history
from safe_lab.replay.recording import Recording, read_recording
from safe_lab.replay.replaying import Comparison, Replay, Replayer, configure

__all__ = [
    "Comparison",
    "CostModel",
    "History",
    "Moment",
    "Recording",
    "Replay",
    "Replayer",
    "check_replayable",
    "configure",
    "forecast_peak",
    "read_recording",
    "replay_history",
]
