"""The space of a study: what each dotted key of the configuration may be, and when it is asked for at all."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from safe_lab import yaml_core
from safe_lab.section import ConfigError, Section
from safe_lab.suggest import did_you_mean

if TYPE_CHECKING:
    from optuna.distributions import CategoricalChoiceType
    from optuna.trial import Trial

Number = Annotated[int, Field(strict=True)] | Annotated[float, Field(strict=True, allow_inf_nan=False)]
_MOST_GRID_VALUES = 10_000


class ParameterSection(Section):
    """What one key of the configuration may be: a range, or one of some choices."""

    low: Number | None = Field(None, description="smallest value of a range")
    high: Number | None = Field(None, description="largest value of a range")
    log: bool = Field(False, description="as likely in every decade of the range")
    step: Number | None = Field(None, description="distance of neighbouring values; null: any value (integers: 1)")
    choices: Annotated[list[Any], Field(min_length=1)] | None = Field(
        None, description="instead of a range: the values"
    )
    when: dict[str, Any] = Field(
        default_factory=dict,
        description="other keys of the space -> value, or list of values, that they must have; else this key stays as the base "
        "has it",
    )

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"choices": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check_together(self) -> ParameterSection:
        fault = self._find_fault()
        if fault:
            raise PydanticCustomError("option", fault)
        return self

    def _find_fault(self) -> str | None:
        if self.choices is not None:
            if (self.low, self.high, self.step) != (None, None, None) or self.log:
                return "choices stand alone: no low, high, step or log beside them"
            plain = [_to_plain(choice) for choice in self.choices]
            # Optuna takes those for the same that Python does: 1, 1.0 and true.
            return "a choice stands twice" if any(choice in plain[:i] for i, choice in enumerate(plain)) else None
        if self.low is None or self.high is None:
            return "low and high are needed, or choices"
        if self.low > self.high:
            return f"low is {self.low:g}, above high, {self.high:g}"
        if self.log and self.low <= 0:
            return f"low is {self.low:g}, and a logarithmic range lies above 0"
        if self.step is not None and self.step <= 0:
            return f"step is {self.step:g}, and must be more than 0"
        if self.step is not None and self.log:
            return "a logarithmic range has no step"
        return None


@dataclass(frozen=True)
class Parameter:
    """One key of the space.

    Attributes:
        key: Dotted key of the configuration.
        settings: What it may be.
        is_integer: The configuration takes nothing but whole numbers there.
    """

    key: str
    settings: ParameterSection
    is_integer: bool

    def suggest(self, trial: Trial) -> Any:
        """The value a trial is to have."""
        settings = self.settings
        if settings.choices is not None:
            return self.from_plain(
                trial.suggest_categorical(self.key, [_to_plain(choice) for choice in settings.choices])
            )
        assert settings.low is not None and settings.high is not None
        low, high, step = settings.low, settings.high, settings.step
        if self.is_integer:
            return trial.suggest_int(self.key, int(low), int(high), step=int(step or 1), log=settings.log)
        return trial.suggest_float(self.key, low, high, step=step, log=settings.log)

    def from_plain(self, plain: Any) -> Any:
        """The value of the configuration from the one that Optuna keeps."""
        if self.settings.choices is None:
            return plain
        return next(choice for choice in self.settings.choices if _to_plain(choice) == plain)

    def to_plain(self, value: Any) -> Any:
        """The value that Optuna keeps for one of the configuration.

        Raises:
            ValueError: It is not in the space.
        """
        settings = self.settings
        if settings.choices is not None:
            for choice in settings.choices:
                if type(choice) is type(value) and choice == value:
                    return _to_plain(choice)
            raise ValueError(f"{value!r} is none of its choices, {_list(settings.choices)}")
        assert settings.low is not None and settings.high is not None
        if isinstance(value, bool) or not isinstance(value, int | float) or (self.is_integer and value != int(value)):
            raise ValueError(f"{value!r} is no {'whole ' if self.is_integer else ''}number")
        if not settings.low <= value <= settings.high:
            raise ValueError(f"{value!r} is not between {settings.low!r} and {settings.high!r}")
        if settings.step is not None and not _is_whole((value - settings.low) / settings.step):
            raise ValueError(f"{value!r} is no whole number of steps of {settings.step!r} from {settings.low!r}")
        return int(value) if self.is_integer else float(value)

    def grid(self) -> list[Any] | None:
        """All values, as Optuna keeps them; None where there is no end to them."""
        settings = self.settings
        if settings.choices is not None:
            return [_to_plain(choice) for choice in settings.choices]
        step = settings.step or (1 if self.is_integer and not settings.log else None)
        if step is None:
            return None
        assert settings.low is not None and settings.high is not None
        count = math.floor((settings.high - settings.low) / step + 1e-9) + 1
        return [settings.low + i * step for i in range(count)] if count <= _MOST_GRID_VALUES else None

    def draw(self, draw: random.Random) -> Any:
        """Any value."""
        values = self.settings.choices or self.grid()
        if values is not None:
            return draw.choice(values)
        assert self.settings.low is not None and self.settings.high is not None
        value = draw.uniform(self.settings.low, self.settings.high)
        return round(value) if self.is_integer else value

    def ends(self) -> list[Any]:
        """Values to try on the schema: every choice, or both ends of the range."""
        return self.settings.choices or [self.settings.low, self.settings.high]


class Space:
    """The keys of a study, in an order in which each follows those that it depends on."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        """Order the parameters.

        Raises:
            ConfigError: A condition names no key of the space, or a value that the key cannot have, or keys wait for each other.
        """
        self.parameters = _in_order({parameter.key: parameter for parameter in parameters})

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """Values by dotted key of one trial; keys whose conditions do not hold are left out."""
        values: dict[str, Any] = {}
        for parameter in self.parameters:
            if _holds(parameter, values):
                values[parameter.key] = parameter.suggest(trial)
        return values

    def draw(self, draw: random.Random) -> dict[str, Any]:
        """Values of any point of the space, for trying the schema on it."""
        values: dict[str, Any] = {}
        for parameter in self.parameters:
            if _holds(parameter, values):
                values[parameter.key] = parameter.draw(draw)
        return values

    def read(self, plain: Mapping[str, Any]) -> dict[str, Any]:
        """Values by dotted key from those that Optuna keeps of a trial."""
        return {
            parameter.key: parameter.from_plain(plain[parameter.key])
            for parameter in self.parameters
            if parameter.key in plain
        }

    @property
    def keys(self) -> list[str]:
        """Dotted keys."""
        return [parameter.key for parameter in self.parameters]

    def asked(self, plain: Mapping[str, Any]) -> dict[str, Any]:
        """What of some plain values is asked for: those whose conditions hold."""
        values: dict[str, Any] = {}
        for parameter in self.parameters:
            if parameter.key in plain and _holds(parameter, values):
                values[parameter.key] = parameter.from_plain(plain[parameter.key])
        return {key: plain[key] for key in values}

    def lacks(self, plain: Mapping[str, Any]) -> list[str]:
        """Keys that are asked for and have no value."""
        values = self.read(self.asked(plain))
        return [one.key for one in self.parameters if one.key not in plain and _holds(one, values)]

    def check_point(self, point: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """A known point as Optuna keeps it, and what is wrong with it, a line each."""
        by_key = {parameter.key: parameter for parameter in self.parameters}
        plain, faults = {}, []
        for key, value in point.items():
            if key not in by_key:
                faults.append(f"{key}: no key of the space{did_you_mean(key, by_key)}")
                continue
            try:
                plain[key] = by_key[key].to_plain(value)
            except ValueError as error:
                faults.append(f"{key}: {error}")
        if not faults:
            faults += [
                f"{parameter.key}: not asked for where {_list_conditions(parameter)} does not hold"
                for parameter in self.parameters
                if parameter.key in point and not _may_hold(parameter, point)
            ]
        return plain, faults


def _in_order(parameters: Mapping[str, Parameter]) -> tuple[Parameter, ...]:
    faults = []
    for key, parameter in parameters.items():
        for other, wanted in parameter.settings.when.items():
            if other not in parameters:
                faults.append(f"space.{key}.when: {other!r} is no key of the space{did_you_mean(other, parameters)}")
                continue
            for value in _as_list(wanted):
                try:
                    parameters[other].to_plain(value)
                except ValueError as error:
                    faults.append(f"space.{key}.when.{other}: {error}")
    if faults:
        raise ConfigError("\n".join(faults))
    ordered: dict[str, Parameter] = {}
    while len(ordered) < len(parameters):
        ready = [
            key
            for key, parameter in parameters.items()
            if key not in ordered and all(other in ordered for other in parameter.settings.when)
        ]
        if not ready:
            waiting = [key for key in parameters if key not in ordered]
            raise ConfigError(f"space: the conditions of {', '.join(waiting)} wait for each other")
        ordered |= {key: parameters[key] for key in ready}
    return tuple(ordered.values())


def _holds(parameter: Parameter, values: Mapping[str, Any]) -> bool:
    return all(
        other in values and values[other] in _as_list(wanted) for other, wanted in parameter.settings.when.items()
    )


def _may_hold(parameter: Parameter, point: Mapping[str, Any]) -> bool:
    """Whether the condition can be met where some keys of it are still to be drawn."""
    return all(
        other not in point or point[other] in _as_list(wanted) for other, wanted in parameter.settings.when.items()
    )


def _list_conditions(parameter: Parameter) -> str:
    return ", ".join(f"{other}: {_list(_as_list(wanted))}" for other, wanted in parameter.settings.when.items())


def _list(values: Sequence[Any]) -> str:
    return ", ".join(yaml_core.write(value, flow=True).removesuffix("...\n").strip() for value in values)


def _as_list(wanted: Any) -> list[Any]:
    return wanted if isinstance(wanted, list) else [wanted]


def _is_whole(number: float) -> bool:
    return math.isclose(number, round(number), abs_tol=1e-6)


def _to_plain(choice: Any) -> CategoricalChoiceType:
    """A plain value as it is; a list or mapping as YAML."""
    if choice is None or isinstance(choice, bool | int | float | str):
        return choice
    return yaml_core.write(choice, flow=True).strip()
