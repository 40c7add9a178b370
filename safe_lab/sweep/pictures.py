"""What a study looks like: front or history, slices through every key, importance of the keys, as interactive pages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from safe_lab.whole_file import whole_file

if TYPE_CHECKING:
    import plotly.graph_objects as go

log = logging.getLogger(__name__)

Target = Callable[[FrozenTrial], float]
# Fewer say nothing of what matters.
_FEWEST_TRIALS = 4


def measure_importance(study: Study, objectives: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Share of each key in how an objective varies, by objective, from the most important down.

    By functional ANOVA over a random forest (Hutter, Hoos and Leyton-Brown, ICML 2014), as Optuna does it. Keys that are asked
    for under a condition only are left out, as they are no part of every trial. Empty for an objective that did not vary, or with
    fewer than four complete trials.
    """
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    found: dict[str, dict[str, float]] = {}
    for place, name in enumerate(objectives):
        values = {trial.values[place] for trial in complete}
        if len(complete) < _FEWEST_TRIALS or len(values) == 1:
            found[name] = {}
            continue
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        found[name] = optuna.importance.get_param_importances(study, evaluator=evaluator, target=_target(place))
    return found


def draw(study: Study, objectives: Mapping[str, str], folder: Path) -> dict[str, go.Figure]:
    """Write the pages of a study, beside one copy of plotly's script; none without plotly, or a complete trial.

    Args:
        study: With its trials.
        objectives: Direction by figure.
        folder: Made if need be.

    Returns:
        The pictures, by the names of the pages.
    """
    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        return {}
    if find_spec("plotly") is None:
        log.warning('no pictures: pip install "safe-lab[sharpness]" brings plotly')
        return {}
    from plotly.offline import get_plotlyjs

    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "plotly.min.js") as stream:
        stream.write(get_plotlyjs().encode())
    figures = dict(_figures(study, objectives))
    for name, figure in figures.items():
        with whole_file(folder / f"{name}.html") as stream:
            stream.write(figure.to_html(include_plotlyjs="plotly.min.js").encode())
    return figures


def _figures(study: Study, objectives: Mapping[str, str]) -> Iterator[tuple[str, go.Figure]]:
    show, names = optuna.visualization, list(objectives)
    if len(names) == 1:
        yield "history", show.plot_optimization_history(study, target_name=names[0])
    elif len(names) <= 3:
        yield "front", show.plot_pareto_front(study, target_names=names)
    for place, name in enumerate(names):
        yield f"slices-{_file_name(name)}", show.plot_slice(study, target=_target(place), target_name=name)
    importance = measure_importance(study, objectives)
    for place, name in enumerate(names):
        if importance[name]:
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            figure = show.plot_param_importances(study, evaluator=evaluator, target=_target(place), target_name=name)
            yield f"importance-{_file_name(name)}", figure


def _target(place: int) -> Target:
    def target(trial: FrozenTrial) -> float:
        value: float = trial.values[place]
        return value

    return target


def _file_name(figure: str) -> str:
    return figure.replace("/", "-")
