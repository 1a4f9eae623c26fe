"""What a sample is labelled by: `cls`, a field of its `json`, or its encoded caption.

`json:FIELD` is the number of a name, or the name itself, in the list FIELDs of the card's `info`. So emoji,
which have `style` there and `styles` in the card, have styles to be conditioned on as well as classes. `text`
is no number but the caption, see text.py.
"""

import json
from collections.abc import Sequence
from typing import Any

CLASS = "cls"
CAPTION = "text"
TEXT = "text.npy"  # the encoded caption


def member_of(label: str) -> str:
    """Return the member of a sample that a label is read from."""
    return {CLASS: CLASS, CAPTION: TEXT}.get(label, "json")


def field_of(label: str) -> str:
    """Return the field of a label `json:FIELD`.

    Raises `ValueError` for a label that is something else.
    """
    member, _, field = label.partition(":")
    if member != "json" or not field:
        raise ValueError(f"there is no label {label!r}; expected cls, text, or json:FIELD such as json:style")
    return field


def names_of(info: dict[str, Any], label: str) -> list[str]:
    """Return the names of a label's numbers, as far as a card knows them; captions have none."""
    if label == CAPTION:
        return []
    return info.get("classes" if label == CLASS else f"{field_of(label)}s", [])


def known_fields(info: dict[str, Any]) -> list[str]:
    """Return the fields that a card has names for."""
    lists = {
        name: value for name, value in info.items() if isinstance(value, list) and value and name != "classes"
    }
    return [name[:-1] for name, value in lists.items() if name.endswith("s") and isinstance(value[0], str)]


def json_label(data: bytes, label: str, names: Sequence[str]) -> int:
    """Return the label in a `json` member.

    Raises `ValueError` where the field is not there, or not among the names.
    """
    field = field_of(label)
    try:
        found = json.loads(data)[field]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its json has no field {field!r} to label it by") from error
    if isinstance(found, str) and found in names:
        return names.index(found)
    if type(found) is int and 0 <= found < len(names):
        return found
    listed = ", ".join(names[:10])
    raise ValueError(f"{field} is {found!r}; expected a number below {len(names)}, or one of {listed}")
