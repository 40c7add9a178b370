"""What freezes when, without a model: from the scores of one scoring after the other to the units that freeze.

The :class:`~safe_lab.freezing.Freezer` asks it in training, and a replay asks it about scores that were recorded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from safe_lab.importance import METRICS
from safe_lab.policy import POLICIES, PredictedSavings, State, frozen_depth, importance_shares, normalize
from safe_lab.schedule import CURVES, is_settled, threshold
from safe_lab.suggest import did_you_mean


@dataclass(frozen=True)
class FreezingRule:
    """What freezes when; see the ``freezing`` section of the YAML for each field.

    Times are counted in scorings, from 1.
    """

    policy: str = "safe"
    metric: str = "cka"
    metric_options: Mapping[str, Any] = field(default_factory=dict)
    normalize: str = "none"
    warmup: int | Literal["stable"] = 1
    stable_share: float = 0.05
    final: int = 6
    curve: str = "cubic"
    stairs: int = 4
    final_threshold: float = 0.05
    final_share: float = 0.5
    final_importance: float = 0.1
    refresh: bool = True

    def __post_init__(self) -> None:
        """Check names and ranges.

        Raises:
            ValueError: A policy, metric, option or curve that does not exist, or a number out of range.
        """
        for what, name, known in (
            ("policy", self.policy, POLICIES),
            ("metric", self.metric, METRICS),
            ("curve", self.curve, CURVES),
        ):
            if name not in known:
                raise ValueError(f"{name!r} is no {what}{did_you_mean(name, known)}; there are {', '.join(known)}")
        METRICS[self.metric].check_options(self.metric_options)
        normalize([], self.normalize)
        if self.warmup == "stable":
            if not POLICIES[self.policy].uses_scores:
                raise ValueError(f"warmup: stable needs scores to settle, and policy {self.policy} has none")
        elif not isinstance(self.warmup, int) or not 0 <= self.warmup <= self.final:
            raise ValueError(f"warmup (t_w) is {self.warmup!r}: from 0 to final (t_f), {self.final}, or stable")
        if self.stairs < 1 or not self.stable_share > 0:
            raise ValueError("stairs must be at least 1, and stable_share positive")
        if not (0 <= self.final_share <= 1 and 0 <= self.final_importance <= 1):
            raise ValueError("final_share and final_importance must lie between 0 and 1")


DEFAULT_RULE = FreezingRule()


@dataclass(frozen=True)
class Decision:
    """What came of one scoring. Lists are by unit, in the order of execution.

    Attributes:
        scores: Importance before normalisation; a frozen unit keeps the score it froze with; None if the policy needs none.
        normalized: Importance as compared with the level; None likewise.
        level: tau_t, or the share of the units or of their importance that the schedule gives at t; None for a policy without.
        freezes: Units that are to freeze now.
    """

    scores: list[float] | None
    normalized: list[float] | None
    level: float | None
    freezes: list[int]


class Decider:
    """Decides at one scoring after the other which units freeze, by a rule, and remembers what it has decided on.

    Attributes:
        rule: What freezes when.
        t: Scorings so far.
        frozen: Units that are frozen.
        scores: Importance by unit at the last scoring; None before the first, or if the policy needs none.
        warmup_end: t_w, once it is known.
    """

    def __init__(
        self, rule: FreezingRule, num_units: int, *, seed: int = 0, savings: PredictedSavings | None = None
    ) -> None:
        """Decide on so many units.

        Args:
            rule: What freezes when.
            num_units: How many units there are.
            seed: Of the run, for policies that draw.
            savings: What freezing saves, for policy ``budget``; None: 20 a unit in the frozen run from the input, 1 elsewhere.
        """
        self.rule = rule
        self.t = 0
        self.frozen: set[int] = set()
        self.scores: list[float] | None = None
        self.warmup_end = rule.warmup if isinstance(rule.warmup, int) else None
        self._policy = POLICIES[rule.policy]
        self._num_units = num_units
        self._seed = seed
        self._savings = savings

    @property
    def wants_scores(self) -> bool:
        """Whether live units are to be scored anew for the next decision."""
        fresh = self.rule.refresh or self.warmup_end is None or self.t < max(self.warmup_end, 1)
        return self._policy.uses_scores and fresh

    @property
    def frozen_depth(self) -> int:
        """Length of the frozen run of units from the input."""
        return frozen_depth(self.frozen, self._num_units)

    @property
    def level(self) -> float | None:
        """tau_t at the last scoring, or the share of the units or their importance that the schedule gave; None without such."""
        if self._policy.level == "none":
            return None
        return threshold(
            self.t,
            start=self.warmup_end,
            end=self.rule.final,
            final=self.final_level,
            curve=self.rule.curve,
            stairs=self.rule.stairs,
        )

    @property
    def final_level(self) -> float:
        """What the level rises to."""
        finals = {
            "threshold": self.rule.final_threshold,
            "share": self.rule.final_share,
            "importance": self.rule.final_importance,
            "none": 0.0,
        }
        return finals[self._policy.level]

    def decide(self, scores: Sequence[float] | None = None) -> Decision:
        """Take the next decision; what freezes by it is told to :meth:`freeze`.

        Args:
            scores: Importance by unit, if :attr:`wants_scores`; those of frozen units are the ones they froze with.
        """
        previous = self.scores
        if scores is not None:
            self.scores = list(scores)
        self.t += 1
        if self.warmup_end is None and previous is not None and self.scores is not None:
            self.warmup_end = self.t if is_settled(previous, self.scores, share=self.rule.stable_share) else None
        normalized = None if self.scores is None else normalize(self.scores, self.rule.normalize)
        state = State(
            scores=normalized or [],
            level=self.level or 0.0,
            frozen=self.frozen,
            num_units=self._num_units,
            warm=self.warmup_end is not None and self.t >= self.warmup_end,
            seed=self._seed,
            savings=self._savings,
            final_level=self.final_level,
        )
        kept = None if self.scores is None else list(self.scores)
        return Decision(kept, normalized, self.level, self._policy.select(state))

    def freeze(self, units: Collection[int]) -> None:
        """These units are frozen from now on."""
        self.frozen.update(units)

    def explain_idle(self) -> str | None:
        """Why nothing has frozen, in a sentence for the person; None if something has, or nothing was to."""
        if self.frozen or self.rule.policy == "none":
            return None
        if not self.t:
            return "nothing froze: the run ended before its first scoring (freezing.interval)"
        if self.warmup_end is None:
            return f"nothing froze: the scores never settled to within {self.rule.stable_share:.0%}, so warm-up did not end"
        if self.level is None:
            return f"nothing froze: after {self.t} scorings warm-up (t_w = {self.warmup_end}) was not over"
        if self.scores is None:
            return f"nothing froze: after {self.t} scorings the schedule stands at {self.level}"
        normalized = normalize(self.scores, self.rule.normalize)
        if self._policy.level == "importance":
            share = min(importance_shares(normalized))
            too_small = share > self.level or self.level < self.final_level
            return (
                f"nothing froze: after {self.t} scorings the budget is {self.level:.3g} of all importance, and the smallest "
                f"share of a unit {share:.3g}; "
                + ("raise final_importance, or lower final" if too_small else "what fits would save nothing")
            )
        smallest = min(normalized)
        return (
            f"nothing froze: after {self.t} scorings the threshold is {self.level:.3g}, and the smallest score {smallest:.3g}; "
            "raise final_threshold, lower final, or normalize the scores"
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides about later scorings: plain values."""
        return {"t": self.t, "frozen": sorted(self.frozen), "scores": self.scores, "warmup_end": self.warmup_end}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`, which may have other entries besides; what is frozen in it the caller freezes."""
        self.t = state["t"]
        self.scores = state["scores"]
        self.warmup_end = state["warmup_end"]
