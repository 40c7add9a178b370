"""YAML 1.2's core schema for reading and writing: ``1e-3`` is a number, ``no`` a string, a doubled key an error."""

from __future__ import annotations

import re
from typing import Any

import yaml

# Tag, pattern and possible first characters of every scalar that is not a string.
_SCALARS = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for tag, pattern, firsts in _SCALARS:
        for first in firsts:
            entry = (f"tag:yaml.org,2002:{tag}", re.compile(rf"(?:{pattern})\Z"))
            table.setdefault("" if first == "\0" else first, []).append(entry)
    return table


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers()

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else str(key))
        return super().construct_mapping(node, deep)


# PyYAML's own constructor reads a leading 0 as octal.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def parse(text: str) -> Any:
    """Read YAML as plain values; no tag makes an object.

    Raises:
        ValueError: Not YAML, or a key stands twice; one line that names the place.

    >>> parse("{rate: 1e-3, answer: no, seed: 010}")
    {'rate': 0.001, 'answer': 'no', 'seed': 10}
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError("not YAML: " + " ".join(str(error).split())) from None


def write(value: Any, *, flow: bool = False) -> str:
    """Plain values as YAML that :func:`parse` reads back; ``flow`` puts them on one line."""
    text: str = yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=10**6,
        default_flow_style=flow,
    )
    return text
