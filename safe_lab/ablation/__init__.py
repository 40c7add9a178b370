"""Ablations: variants of a run, trained with the same seeds and held against a baseline, with the statistics few seeds allow."""

from safe_lab.ablation.ablating import compare_runs, run
from safe_lab.ablation.comparison import Comparison, Verdict, compare
from safe_lab.ablation.experiment_file import Experiment, check_experiment, load
from safe_lab.ablation.rules import Rules

__all__ = ["Comparison", "Experiment", "Rules", "Verdict", "check_experiment", "compare", "compare_runs", "load", "run"]
