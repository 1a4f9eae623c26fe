"""Sweeps: `optimizer.lr=1e-4,3e-4` after a config is two runs, each in a folder named by its values.

A list is what YAML reads between brackets, so that `nfe=[1,2],[1,4]` are two values of two numbers each, and
`"a,b"`, `[1,2]` and `{name: x, y: 1}` are one. Several lists are multiplied.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from ..trainer.config import ConfigError


@dataclass(frozen=True)
class Point:
    """One run of a sweep: the name of its folder, empty where nothing is swept, and its overrides."""

    name: str
    overrides: tuple[str, ...]


def points_of(overrides: Sequence[str]) -> list[Point]:
    """Return the product of all lists among overrides; one point without a name where there is none.

    Raises ConfigError where two runs would have one folder.
    """
    parts = [override.partition("=") for override in overrides]
    choices = [(key, values_of(value)) for key, equals, value in parts if equals]
    swept = [key for key, values in choices if len(values) > 1]
    names = {key: _short(key, swept) for key in swept}
    points = []
    for values in itertools.product(*(values for _, values in choices)):
        chosen = [(key, value) for (key, _), value in zip(choices, values, strict=True)]
        name = "_".join(f"{names[key]}={_as_name(value)}" for key, value in chosen if key in names)
        # What is no override stays, for the config's own message.
        told = tuple(f"{key}={value}" for key, value in chosen)
        points.append(Point(name, told + tuple(key for key, equals, _ in parts if not equals)))
    found = [point.name for point in points]
    for point in points:
        if found.count(point.name) > 1:
            twins = [" ".join(each.overrides) for each in points if each.name == point.name]
            raise ConfigError(
                f"the sweep has two runs for the folder {point.name!r}: {' and '.join(twins[:2])}; "
                "give each value once, and values that differ in letters or digits"
            )
    return points


def values_of(text: str) -> list[str]:
    """Return the values of a comma list as they were written; a text that is no list is its only value."""
    try:
        node = yaml.compose(f"[{text}]", Loader=yaml.SafeLoader)
    except yaml.YAMLError:  # such as shards/{000..099}.tar
        return [text]
    # A text such as "1] , [2" closes the bracket itself.
    if not isinstance(node, yaml.SequenceNode) or len(node.value) < 2:
        return [text]
    marks = [(each.start_mark.index, each.end_mark.index) for each in node.value]
    return [f"[{text}]"[start:end] for start, end in marks]


def _short(key: str, keys: Sequence[str]) -> str:
    """Return the last part of a dotted key, or all of it where another key ends like it."""
    last = key.rsplit(".", 1)[-1]
    return last if sum(other.rsplit(".", 1)[-1] == last for other in keys) == 1 else key


def _as_name(value: str) -> str:
    """Return a value in letters that need no quotes in a shell."""
    return re.sub(r"[^\w.+-]+", "-", value).strip("-.") or "empty"
