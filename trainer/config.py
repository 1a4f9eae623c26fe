"""From a YAML file and `key=value` overrides to a checked Recipe; every message names the dotted key.

A plug-in (an objective, a network) is found by its file's name: `{name: semigroup, ...}` is the class
`Semigroup` of objectives/semigroup.py, and a dotted path `my_lab.losses:Mine` is a user's own class.

A preset, `preset: meanflow`, is the settings of configs/presets/meanflow.yaml, under a config's own.
"""

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError, create_model

FORBID = ConfigDict(extra="forbid")


class ConfigError(ValueError):
    """A mistake in a config, told so that a person can mend it."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 3e-4 as text and lets a key stand twice; here it is a number, and an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping, refusing a key that stands twice."""
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                line = node.start_mark.line + 1
                raise ConfigError(
                    f"{node.start_mark.name}: the key {key!r} stands twice in the section at line {line}"
                )
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: list(resolvers) for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, *, source: str) -> Any:
    """Return what a YAML text says; `source` names it in messages."""
    loader = _Loader(text)
    loader.name = source
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is no valid YAML: {error}") from error
    finally:
        loader.dispose()


def read_config(file: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Return the settings of a YAML file with overrides such as `optimizer.lr=3e-4` applied in order."""
    if not file.is_file():
        near = nearest(file.name, [path.name for path in file.parent.glob("*.yaml")])
        raise ConfigError(f"there is no config {file}{near}")
    settings = parse_yaml(file.read_text(), source=str(file))
    if not isinstance(settings, dict):
        raise ConfigError(
            f"{file} holds {type(settings).__name__}, expected sections such as `model:` and `data:`"
        )
    for override in overrides:
        _apply(settings, override)
    return _on_preset(settings) if settings.get("preset") is not None else settings


def preset_names() -> list[str]:
    """Return the names of the presets: their files."""
    files = (resources.files("driftmap.configs") / "presets").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def _on_preset(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings on top of those of the preset that they name; the rule is the preset's."""
    name, own = str(settings["preset"]), {key: settings[key] for key in settings if key != "preset"}
    if name not in preset_names():
        raise ConfigError(f"preset: no such preset {name!r}{nearest(name, preset_names())}")
    file = resources.files("driftmap.configs") / "presets" / f"{name}.yaml"
    below = parse_yaml(file.read_text(), source=f"the preset {name}")
    rule, objective = below["objective"]["name"], own.get("objective", {})
    if isinstance(objective, dict) and objective.get("name", rule) != rule:
        raise ConfigError(
            f"objective.name: {objective['name']!r}, but the preset {name!r} is of the objective {rule!r}; "
            "remove the config's objective, or preset"
        )
    return merged(below, own)


def merged(below: Any, above: Any) -> Any:
    """Return settings key by key, `above` where both have one; a thing of another name is another thing."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    if "name" in above and above["name"] != below.get("name"):
        return above
    return {**below, **{key: merged(below.get(key), value) for key, value in above.items()}}


def _apply(settings: dict[str, Any], override: str) -> None:
    """Set one dotted key in place."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"the override {override!r} is not of the form key=value, such as optimizer.lr=3e-4"
        )
    *sections, last = key.split(".")
    for section in sections:
        inner = settings.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(
                f"the override {override!r} looks inside {section!r}, which is the value {inner!r}"
            )
        settings = inner
    settings[last] = parse_yaml(value, source=f"the override {override!r}")


def nearest(name: str, names: Iterable[str]) -> str:
    """Return a hint for a message: the nearest of the names, if one is near, and all of them."""
    listed = sorted(names)
    if not listed:
        return ""
    close = difflib.get_close_matches(name, listed, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (there are: {', '.join(listed)})"


def checked(kind: type, settings: Any, *, place: str) -> Any:
    """Return `kind` made from settings, or raise a ConfigError with a line a mistake and its dotted place."""
    try:
        return TypeAdapter(kind).validate_python(settings)
    except ValidationError as error:
        raise ConfigError("\n".join(_message(entry, kind, place) for entry in error.errors())) from error


def refuse_unknown_keys(kind: type, settings: dict[str, Any], *, place: str) -> None:
    """Raise ConfigError at keys that a class does not take: a user's plain dataclass would ignore them."""
    known = inspect.signature(kind).parameters
    unknown = [f"{place}.{key}: no such key{nearest(key, known)}" for key in settings if key not in known]
    if unknown:
        raise ConfigError("\n".join(unknown))


def _message(entry: Any, kind: type, place: str) -> str:
    """Return one mistake as a sentence."""
    *sections, last = [str(part) for part in entry["loc"]] or [""]
    path, keys = _walk(TypeAdapter(kind).json_schema(), sections)
    dotted = ".".join(part for part in [place, *path, last] if part) or "the config"
    if entry["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{dotted}: no such key{nearest(last, keys)}"
    if entry["type"] == "union_tag_not_found":
        return f"{dotted}.name: missing; this key is required"
    if entry["type"] in ("missing", "missing_argument"):
        return f"{dotted}: missing; this key is required"
    if entry["type"] == "union_tag_invalid":
        tags = re.findall(r"'(\w+)'", entry["ctx"]["expected_tags"])
        return f"{dotted}.name: no such name {entry['ctx']['tag']!r}{nearest(entry['ctx']['tag'], tags)}"
    message = entry["msg"].removeprefix("Value error, ")
    return f"{dotted}: {message[:1].lower()}{message[1:]}; found {entry.get('input')!r}"


def _walk(schema: dict[str, Any], sections: list[str]) -> tuple[list[str], list[str]]:
    """Return the sections as a user wrote them, without tags of unions, and the keys legal at their end."""
    path: list[str] = []
    nodes = _members(schema, schema)
    for part in sections:
        inner = [node["properties"][part] for node in nodes if part in node.get("properties", {})]
        if inner:
            path.append(part)
            nodes = [member for node in inner for member in _members(node, schema)]
        else:
            nodes = [
                node for node in nodes if node.get("properties", {}).get("name", {}).get("const") == part
            ]
    return path, [key for node in nodes for key in node.get("properties", {})]


def _members(node: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a JSON schema node with its `$ref` followed, or the members of its union."""
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    choices = node.get("oneOf", node.get("anyOf", []))
    return [member for choice in choices for member in _members(choice, schema)] or [node]


def plugin_names(package: str) -> list[str]:
    """Return the names that a config may use for the plug-ins of a package: its files."""
    found = importlib.util.find_spec(package)
    assert found is not None
    return [module.name for module in pkgutil.iter_modules(found.submodule_search_locations)]


def plugin_class(package: str, name: str, *, place: str) -> type:
    """Return the class of a plug-in, by file name or dotted path."""
    module_name, colon, class_name = name.partition(":")
    if not colon and name not in plugin_names(package):
        raise ConfigError(f"{place}.name: no such name {name!r}{nearest(name, plugin_names(package))}")
    try:
        module = importlib.import_module(module_name if colon else f"{package}.{name}")
    except (ModuleNotFoundError, ValueError) as error:
        raise ConfigError(f"{place}.name: cannot import {name!r}: {error}") from error
    wanted = (class_name or name.replace("_", "")).lower()
    for attribute, value in vars(module).items():
        if attribute.lower() == wanted and isinstance(value, type):
            return value
    raise ConfigError(f"{place}.name: {module.__name__} holds no class {class_name or name!r}")


def split_name(settings: Any, *, place: str) -> tuple[str, dict[str, Any]]:
    """Return the name of a plug-in and its other settings."""
    if not isinstance(settings, dict) or not isinstance(settings.get("name"), str):
        raise ConfigError(f"{place}.name: missing; say which one, as in {place}: {{name: ...}}")
    return settings["name"], {key: value for key, value in settings.items() if key != "name"}


def checked_arguments(constructor: type, settings: dict[str, Any], *, place: str) -> dict[str, Any]:
    """Return all arguments of a constructor, defaults included, checked against its typed signature."""
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(constructor.__init__).parameters.items():
        if name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            default = ... if parameter.default is inspect.Parameter.empty else parameter.default
            fields[name] = (_any_length(parameter.annotation), default)
    model = create_model(constructor.__name__, __config__=FORBID, **fields)
    return checked(model, settings, place=place).model_dump()


def _any_length(annotation: Any) -> Any:
    """Return tuple[X, ...] for tuple[X], which is how diffusers (0.42) annotates tuples of any length."""
    arguments = get_args(annotation)
    if get_origin(annotation) is tuple and len(arguments) == 1:
        return tuple[arguments[0], ...]
    return annotation
