"""The budget policy: freeze what saves most while the importance frozen stays within a growing budget."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple

from safe_lab.policy.state import PredictedSavings, State

# Importance is counted in whole parts, savings in whole FLOPs or bytes: sums are exact, so a tie is one on every rank.
_PARTS = 10**12
# Sets that a search of policy budget may look at: some 0.03 s.
_MOST_CHOICES = 15_000


def select_budget(state: State) -> list[int]:
    r"""The units that save most while the share of all importance that is frozen stays within the level.

    .. math::
        \max_{F \supseteq F_0} \; D_{d(F)} + \sum_{i \in F,\ i > d(F)} E_i
        \quad \text{with} \quad \sum_{i \in F} s_i \le \beta_t, \qquad
        s_i = \frac{\max(\mathrm{Imp}(A_i), 0)}{\sum_j \max(\mathrm{Imp}(A_j), 0)}

    F_0: frozen already, at the scores they froze with; d(F): frozen depth; D and E: ``savings.by_depth`` and ``elsewhere``;
    beta_t: ``level``. Ours, not the paper's.

    Why: freezing pays in the run from the input and hardly anywhere else, and a threshold does not know it: a unit a little
    above it near the input keeps all those under it from paying, and one under it near the output costs importance for nothing.

    While the budget grows, F is taken from the set that is best for ``final_level``. Freezing is for good, and a cheap unit near
    the output, frozen because nothing else fits yet, would eat the importance that the run needs later.

    How: for each depth d the units below d are frozen and d is not; the units above it are a 0/1 knapsack in what is left of
    the budget. The knapsack is searched in the order of saving for importance; of the sets met so far those stay that no other
    beats in both, and that could still reach the best one known if a fraction of a unit might be taken. Where units are alike
    few sets are left. Should more than 15,000 come up, the rest of the search is dropped; units taken one by one in that order
    are the best known from the start, and save less than the optimum by no more than one unit saves outside the run.

    Of equal sets the one of less importance freezes, then that of smaller indices. A unit without importance is free, also
    when the budget is spent; one that saves nothing outside the run does not freeze there.

    >>> scores = [0.06, 0.01, 0.03, 0.2, 0.3, 0.4]
    >>> select_budget(State(scores, level=0.1, frozen=[], num_units=6, warm=True, seed=0))
    [0, 1, 2]
    """
    if not state.warm:
        return []
    frozen = set(state.frozen)
    savings = state.savings or assume_savings(state.num_units)
    costs = [int(_PARTS * share) for share in importance_shares(state.scores)]
    spent = sum(costs[unit] for unit in frozen)
    chosen = [unit for unit in range(state.num_units) if unit not in frozen]
    final = state.level if state.final_level is None else state.final_level
    for level in sorted({state.level, final}, reverse=True):
        chosen = _best_of(chosen, frozen, costs, savings, max(round(_PARTS * level) - spent, 0))
    return chosen


def importance_shares(scores: Sequence[float]) -> list[float]:
    """Each unit's share of all importance, in [0, 1]; a negative score counts as none.

    Returns:
        Shares that add up to 1, or zeros if no score is positive.

    >>> importance_shares([3.0, -2.0, 1.0])
    [0.75, 0.0, 0.25]
    """
    total = math.fsum(score for score in scores if score > 0)
    return [score / total if score > 0 else 0.0 for score in scores]


def assume_savings(num_units: int) -> PredictedSavings:
    """Savings in proportion, where nobody has predicted any: a unit saves 20 in the run from the input, and 1 elsewhere.

    Bytes kept for backward in MiniLM with LoRA, batch 32 x 64: 54 MiB less for each layer in the run, 3 MiB elsewhere.
    """
    return PredictedSavings([20 * depth for depth in range(num_units + 1)], [1] * num_units)


class _Item(NamedTuple):
    """A unit that may freeze outside the run."""

    unit: int
    cost: int
    saving: int
    bit: int


class _Choice(NamedTuple):
    """A set of units, the best in this order first: -saving, parts of importance, -bits of its members."""

    lost: int
    cost: int
    members: int

    def with_item(self, item: _Item) -> _Choice:
        return _Choice(self.lost - item.saving, self.cost + item.cost, self.members - item.bit)


def _best_of(
    units: Sequence[int], frozen: set[int], costs: Sequence[int], savings: PredictedSavings, room: int
) -> list[int]:
    """Those of ``units`` that save most beside the frozen ones.

    Args:
        units: Live units that may freeze, in ascending order.
        frozen: Units frozen already.
        costs: Parts of importance of every unit.
        savings: What freezing saves.
        room: Most parts of importance that may freeze.
    """
    num_units = len(costs)
    # Smaller indices are higher bits.
    bits = [1 << (num_units - 1 - unit) for unit in range(num_units)]
    items = [_Item(unit, costs[unit], round(savings.elsewhere[unit]), bits[unit]) for unit in units]
    items = sorted((item for item in items if item.saving > 0), key=lambda item: Fraction(item.cost, item.saving))
    knapsacks = []
    run, cost, members = set(frozen), 0, 0
    for depth in range(num_units + 1):
        if depth in frozen:
            continue
        start = _Choice(-round(savings.of(run)), cost, -members)
        knapsacks.append((start, [item for item in items if item.unit > depth]))
        if depth not in units or cost + costs[depth] > room:
            break
        run.add(depth)
        cost += costs[depth]
        members += bits[depth]
    best = min(_fill(start, above, room) for start, above in knapsacks)
    choices_left = _MOST_CHOICES
    for start, above in knapsacks:
        best, choices_left = _search(start, above, room, best, choices_left)
    return [unit for unit in units if -best.members & bits[unit]]


def _fill(start: _Choice, items: Sequence[_Item], room: int) -> _Choice:
    """Take items one by one while they fit."""
    choice = start
    for item in items:
        if choice.cost + item.cost <= room:
            choice = choice.with_item(item)
    return choice


def _search(start: _Choice, items: Sequence[_Item], room: int, best: _Choice, choices_left: int) -> tuple[_Choice, int]:
    """The best of ``best`` and all that items can make of ``start``, and how many choices may still be looked at.

    Args:
        start: What is chosen anyway.
        items: In ascending order of cost / saving.
        room: Most cost.
        best: The best choice known.
        choices_left: How many choices may be looked at; beyond it the search is dropped.
    """
    costs = [0, *accumulate(item.cost for item in items)]
    savings = [0, *accumulate(item.saving for item in items)]

    def can_win(choice: _Choice, index: int) -> bool:
        """Whether items from ``index`` on, and a fraction of the first that does not fit, lift a choice to the best."""
        rest = room - choice.cost
        end = bisect_right(costs, costs[index] + rest) - 1
        most = savings[end] - savings[index] - choice.lost
        if end < len(items):
            most += (rest - costs[end] + costs[index]) * items[end].saving // items[end].cost
        return most >= -best.lost

    front = [start] if can_win(start, 0) else []
    for index, item in enumerate(items, start=1):
        if not front:
            return best, choices_left
        met = front + [choice.with_item(item) for choice in front if choice.cost + item.cost <= room]
        choices_left -= len(met)
        if choices_left < 0:
            return best, 0
        front = []
        for choice in sorted(met, key=lambda choice: (choice.cost, choice)):
            if (not front or choice.lost < front[-1].lost) and can_win(choice, index):
                front.append(choice)
    return min([best, *front]), choices_left
