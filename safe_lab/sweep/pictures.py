"""What a study looks like: front or history, slices through every key, importance of the keys, as interactive pages."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from safe_lab.sweep.roster import SAME_AS
from safe_lab.whole_file import whole_file

if TYPE_CHECKING:
    import plotly.graph_objects as go

Target = Callable[[FrozenTrial], float]
# Fewer say nothing of what matters.
_FEWEST_TRIALS = 8
# Share of the trials that count as good ones.
_GOOD = 0.25


def measure_importance(study: Study, objectives: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Share of each key in what makes a trial good, by objective, from the most important down.

    By PED-ANOVA (Watanabe, Bansal and Hutter, IJCAI 2023), as Optuna does it: how far the better quarter of the trials is from
    all of them along each key, keys under a condition among them. Empty for an objective that did not vary, or with fewer
    than eight complete trials.
    """
    complete = [
        trial
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        # Copies of others are no evidence.
        if SAME_AS not in trial.user_attrs
    ]
    study = optuna.create_study(directions=study.directions)
    study.add_trials(complete)
    found: dict[str, dict[str, float]] = {}
    for place, name in enumerate(objectives):
        values = {trial.values[place] for trial in complete}
        if len(complete) < _FEWEST_TRIALS or len(values) == 1:
            found[name] = {}
            continue
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=_GOOD)
        # The evaluator takes less for better, and says so each time.
        target = _target(place, -1 if objectives[name] == "maximize" else 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[name] = optuna.importance.get_param_importances(study, evaluator=evaluator, target=target)
    return found


def draw(
    study: Study, objectives: Mapping[str, str], importance: Mapping[str, Mapping[str, float]], folder: Path
) -> dict[str, go.Figure]:
    """Write the pages of a study, beside one copy of plotly's script; none without a complete trial.

    Args:
        study: With its trials.
        objectives: Direction by figure.
        importance: Of the keys, by figure, from :func:`measure_importance`.
        folder: Made if need be.

    Returns:
        The pictures, by the names of the pages.
    """
    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        return {}
    from plotly.offline import get_plotlyjs

    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "plotly.min.js") as stream:
        stream.write(get_plotlyjs().encode())
    figures = dict(_figures(study, objectives, importance))
    for name, figure in figures.items():
        with whole_file(folder / f"{name}.html") as stream:
            stream.write(figure.to_html(include_plotlyjs="plotly.min.js").encode())
    return figures


def _figures(
    study: Study, objectives: Mapping[str, str], importance: Mapping[str, Mapping[str, float]]
) -> Iterator[tuple[str, go.Figure]]:
    import plotly.graph_objects as go

    show, names = optuna.visualization, list(objectives)
    if len(names) == 1:
        yield "history", show.plot_optimization_history(study, target_name=names[0])
    elif len(names) <= 3:
        yield "front", show.plot_pareto_front(study, target_names=names)
    for place, name in enumerate(names):
        yield f"slices-{_file_name(name)}", show.plot_slice(study, target=_target(place), target_name=name)
    for name, shares in importance.items():
        if shares:
            # The most important on top.
            keys = list(shares)[::-1]
            bars = go.Bar(x=[shares[key] for key in keys], y=keys, orientation="h")
            title = f"what a good {name} hangs on"
            yield f"importance-{_file_name(name)}", go.Figure(bars, layout={"title": title, "xaxis_title": "share"})


def _target(place: int, sign: int = 1) -> Target:
    def target(trial: FrozenTrial) -> float:
        value: float = sign * trial.values[place]
        return value

    return target


def _file_name(figure: str) -> str:
    return figure.replace("/", "-")
