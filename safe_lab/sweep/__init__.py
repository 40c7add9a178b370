"""Search over the settings of runs, freezing schedules above all, with Optuna: from a study file to a front of trials."""

import warnings

import optuna

from safe_lab.sweep.outcome import Outcome, print_tables
from safe_lab.sweep.study_file import StudyFile, load
from safe_lab.sweep.sweeping import run

__all__ = ["Outcome", "StudyFile", "load", "print_tables", "run"]

# What there is to tell a person this package tells.
optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
