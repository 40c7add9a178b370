"""What every YAML file of safe_lab has in common: sections that know no key but their own, and faults told all at once.

Nothing here imports torch.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from safe_lab import yaml_core
from safe_lab.suggest import did_you_mean

# What pydantic adds to an error's place to say which arm of a union it is about.
_UNION_ARM = re.compile(r"[\[(]|^(constrained-\w+|int|str|literal|none|dict|tuple|bool|float)$")


class ConfigError(ValueError):
    """A configuration the user can mend; the message has one line for each fault."""


class Section(BaseModel):
    """A frozen group of settings that knows no key but its own."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=False, protected_namespaces=(), coerce_numbers_to_str=False
    )


SectionType = TypeVar("SectionType", bound=Section)


def read_tree(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file (YAML 1.2: ``1e-3`` is a number, ``no`` a string).

    Raises:
        ConfigError: There is no such file, or it is no YAML, or no mapping.
    """
    tree = _parse(_read(Path(path)), where=str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a mapping of sections is needed, got {type(tree).__name__}")
    return tree


def override(tree: dict[str, Any], assignment: str) -> None:
    """Set one value of a tree, in place.

    Args:
        tree: As from :func:`read_tree`.
        assignment: ``dotted.key=value``; the value is read as YAML.

    Raises:
        ConfigError: It does not read so, or the key leads through a value.
    """
    key, equals, value = assignment.partition("=")
    if not equals or not key:
        raise ConfigError(f"{assignment}: an override reads dotted.key=value")
    *parents, last = key.split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise ConfigError(f"{key}: {parent} holds a value, not a section")
    tree[last] = _parse(value, where=key)


def override_copy(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A tree with some values set.

    Args:
        tree: As from :func:`read_tree`; it stays as it is.
        values: By dotted key.

    Raises:
        ConfigError: A key leads through a value.
    """
    changed = copy.deepcopy(dict(tree))
    for key, value in values.items():
        override(changed, f"{key}={yaml_core.write(value, flow=True)}")
    return changed


def override_all(tree: dict[str, Any], assignments: Sequence[str]) -> list[str]:
    """Set several values, as :func:`override` does; returns the faults, a line each."""
    faults = []
    for assignment in assignments:
        try:
            override(tree, assignment)
        except ConfigError as fault:
            faults.append(str(fault))
    return faults


def check(section: type[SectionType], tree: Mapping[str, Any]) -> SectionType:
    """Check a tree of plain values against a schema.

    Raises:
        ConfigError: With one line for every fault found.
    """
    try:
        return section.model_validate(tree)
    except ValidationError as invalid:
        faults: dict[str, list[str]] = {}
        for error in invalid.errors(include_url=False):
            key, rule = _explain(section, error)
            faults.setdefault(key, []).append(rule)
        # A union reports each of its arms: one line a key, arms joined by "or".
        raise ConfigError(
            "\n".join(f"{key}: {', or '.join(rules)}" if key else rules[0] for key, rules in faults.items())
        ) from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = [str(other) for other in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ConfigError(f"{path}: no such file{did_you_mean(str(path), beside)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def _parse(text: str, where: str) -> Any:
    try:
        return yaml_core.parse(text)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _explain(root: type[Section], error: Any) -> tuple[str, str]:
    """The dotted key, and in one line: the rule, the value got, the near name if the key is unknown."""
    place, beside = _find_place(root, error["loc"])
    key = ".".join(place)
    if error["type"] == "extra_forbidden":
        return key, f"unknown key{did_you_mean(place[-1], beside)}"
    if error["type"] == "missing":
        return key, "missing, and there is no default"
    if error["type"] in ("unknown", "option", "final", "folder"):
        return key, error["msg"]
    message = error["msg"].replace("valid dictionary or instance of", "mapping, the keys of")
    return key, f"{message[0].lower()}{message[1:]}, got {error['input']!r}"


def _find_place(root: Any, loc: Sequence[str | int]) -> tuple[list[str], list[str]]:
    """The dotted place of an error, without the arms of unions that pydantic adds, and the keys there are beside it."""
    place: list[str] = []
    beside: list[str] = []
    for part in loc:
        if hasattr(root, "model_fields"):
            beside = list(root.model_fields)
            root = root.model_fields[part].annotation if part in root.model_fields else None
        elif get_origin(root) is dict:
            # Any name may be a key here, "none" too.
            beside, root = [], get_args(root)[1]
        elif isinstance(part, str) and _UNION_ARM.search(part):
            continue
        place.append(str(part))
    return place, beside
