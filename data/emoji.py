"""Emoji from npm packages: small pictures in several styles, each with a name, a group and keywords.

Two layouts are known. An `emoji-datasource-NAME` package has `emoji.json`, which describes every emoji, and
`img/NAME/64/CODEPOINTS.png`. `@lobehub/fluent-emoji-3d` has `assets/CODEPOINTS.webp` alone, so it is named by
the `emoji.json` of another package beside it. Skin tones and the group of mere components are left out: the
former are near copies of one picture, the latter are no pictures of a thing.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .making import Source
from .pictures import Draft, PicturePolicy, finish


@dataclass(frozen=True)
class _Kind:
    """What is known of a package: the style of its pictures, where they lie, whose they are."""

    style: str
    pictures: str
    suffix: str
    licence: str
    author: str


_DATASOURCE = "emoji-datasource-"
KINDS = {
    f"{_DATASOURCE}google": _Kind("noto", "img/google/64", "png", "Apache-2.0", "Noto Emoji, Google"),
    f"{_DATASOURCE}twitter": _Kind("twemoji", "img/twitter/64", "png", "CC-BY-4.0", "Twemoji, Twitter"),
    "@lobehub/fluent-emoji-3d": _Kind("fluent-3d", "assets", "webp", "MIT", "Fluent Emoji, Microsoft"),
}


@dataclass(frozen=True)
class _Package:
    folder: Path
    name: str
    version: str

    @property
    def kind(self) -> _Kind:
        return KINDS[self.name]

    def picture(self, emoji: dict[str, Any]) -> Path | None:
        """Return the file of an emoji, or None where this style has not drawn it."""
        if self.name.startswith(_DATASOURCE) and not emoji[f"has_img_{self.name.removeprefix(_DATASOURCE)}"]:
            return None
        file = self.folder / self.kind.pictures / f"{emoji['unified'].lower()}.{self.kind.suffix}"
        # Only a package with its own list promises every picture; a missing one is then an error later on.
        return file if self.name.startswith(_DATASOURCE) or file.is_file() else None


@dataclass(frozen=True)
class _Drawing:
    """One emoji in one style."""

    key: str
    file: Path
    about: dict[str, Any]


def emoji(folder: Path | str, *, policy: PicturePolicy) -> Source:
    """Return the emoji of an unpacked npm package, or of all packages below a folder.

    The caption is the emoji's name, the class its group, and "style" the number of its package in the
    card's `styles`. The order is a fixed shuffle, so every shard holds every class and style.

    Raises `ValueError` if no known package is there, or a list of emoji that is damaged.
    """
    packages = _find_packages(Path(folder))
    listed = _read_list(packages, Path(folder))
    classes = sorted({entry["category"] for entry in listed})
    styles = [package.kind.style for package in packages]
    drawings = [
        _Drawing(f"{styles[style]}/{entry['unified'].lower()}", file, _about(entry, classes, style))
        for style, package in enumerate(packages)
        for entry in listed
        if (file := package.picture(entry)) is not None
    ]
    numbers = np.bincount([drawing.about["style"] for drawing in drawings], minlength=len(styles))
    about = [
        {
            "package": f"{package.name}@{package.version}",
            "style": package.kind.style,
            "num_samples": int(count),
        }
        | {"licence": package.kind.licence, "author": package.kind.author}
        for package, count in zip(packages, numbers, strict=True)
    ]
    names = ", ".join(f"{entry['package']} ({entry['author']})" for entry in about)
    return Source(
        samples=partial(_samples, drawings),
        num_samples=len(drawings),
        info={"name": "emoji", **policy.info, "classes": classes, "styles": styles, "packages": about},
        licence=" AND ".join(sorted({package.kind.licence for package in packages})),
        origin=f"npm packages {names}; names and groups from emoji-datasource (MIT)",
        finish=partial(finish, policy),
        buckets=policy.buckets,
    )


def _samples(drawings: list[_Drawing]) -> Iterator[tuple[str, Draft]]:
    for number in np.random.default_rng(0).permutation(len(drawings)):
        drawing = drawings[number]
        yield drawing.key, Draft(drawing.file, str(drawing.file), drawing.about)


def _about(entry: dict[str, Any], classes: list[str], style: int) -> dict[str, Any]:
    name = entry["name"]
    return {
        # Names of Unicode are in capitals, those of flags are not.
        "caption": name.lower() if name.isupper() else name,
        "class": classes.index(entry["category"]),
        "style": style,
        "group": entry["subcategory"],
        "keywords": entry["short_names"],
    }


def _find_packages(folder: Path) -> list[_Package]:
    """Find the known packages: the folder itself, or one or two levels below it (`@lobehub/...`)."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; expected an unpacked npm package of emoji, or several")
    found = {}
    others = []
    for file in sorted(file for depth in ("", "*/", "*/*/") for file in folder.glob(f"{depth}package.json")):
        described = _read_json(file)
        name = described.get("name") if isinstance(described, dict) else None
        if name not in KINDS:
            others.append(f"{file.parent} ({name})")
        elif name in found:
            raise ValueError(
                f"{name} is both in {found[name].folder} and in {file.parent}; remove one of them"
            )
        else:
            found[name] = _Package(file.parent, name, str(described.get("version", "unknown")))
    if not found:
        passed = f", only {', '.join(others[:3])}" if others else ""
        raise ValueError(
            f"{folder} holds no package of emoji that is known{passed}; expected {', '.join(KINDS)}, "
            "each unpacked into a folder of its own"
        )
    return [found[name] for name in KINDS if name in found]


def _read_list(packages: list[_Package], folder: Path) -> list[dict[str, Any]]:
    """Read the first list of emoji, in the order of their codepoints."""
    file = next((package.folder / "emoji.json" for package in packages if _is_listed(package)), None)
    if file is None:
        raise ValueError(
            f"{folder} has no emoji.json to name the pictures of {packages[0].name}; "
            f"put one of {', '.join(name for name in KINDS if name.startswith(_DATASOURCE))} beside it"
        )
    described = _read_json(file)
    if not isinstance(described, list) or not described:
        raise ValueError(f"{file} is no list of emoji; unpack the package again")
    needed = {"name", "unified", "category", "subcategory", "short_names"}
    needed |= {f"has_img_{p.name.removeprefix(_DATASOURCE)}" for p in packages if _is_listed(p)}
    for number, entry in enumerate(described):
        if missing := sorted(needed - set(entry if isinstance(entry, dict) else ())):
            raise ValueError(f"{file}: entry {number} has no {missing[0]!r}; expected {sorted(needed)}")
    kept = [entry for entry in described if entry["category"] != "Component"]
    return sorted(kept, key=lambda entry: entry["unified"])


def _is_listed(package: _Package) -> bool:
    return package.name.startswith(_DATASOURCE)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON ({error}); unpack the package again") from error
