"""From a YAML recipe to a typed, frozen config. A key that nobody reads is an error, and an error names its line.

A name is a file: `method: {name: psft, ...}` is `methods/psft.py`, and the other keys are the fields of its `Config`.
"""

import argparse
import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticCustomError, core_schema

from posttrain.core.errors import UserError


class Strict(BaseModel):
    """A typed part of a recipe: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Schema = TypeVar("Schema", bound=BaseModel)
Place = tuple[str | int, ...]  # the keys that lead to a value
# what PyYAML raises for a control character, for 2026-13-01, for {[a]: 1} and for &a [*a]
UNREADABLE = (yaml.YAMLError, ValueError, TypeError, RecursionError)


def resolve(packages: str | Sequence[str], name: str) -> ModuleType:
    """The plug-in `name` of one of these packages: "methods" means posttrain.methods, "sim.physics" itself.

    A plug-in is a module that has every name of `PROTOCOL` in its package's base.py; other modules are not offered.

    Raises:
        UserError: there is no such plug-in; the message lists those there are.
    """
    packages = [packages] if isinstance(packages, str) else packages
    full = [_package(package) for package in packages]
    for package in full:
        if name in _modules(package) and _is_plugin(module := importlib.import_module(f"{package}.{name}"), package):
            return module
    offered = plugins(*packages)
    places = " and ".join(package.replace(".", "/") for package in full)
    raise UserError(f"{places}: has no {name!r}, {_suggest(name, offered)}", "unknown_name")


def plugins(*packages: str) -> list[str]:
    """The names that `resolve` takes."""
    return [
        n for p in map(_package, packages) for n in _modules(p) if _is_plugin(importlib.import_module(f"{p}.{n}"), p)
    ]


def _package(name: str) -> str:
    return name if name.split(".")[0] in ("posttrain", "sim") else f"posttrain.{name}"


def _modules(package: str) -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__) if m.name != "base")


def _is_plugin(module: ModuleType, package: str) -> bool:
    return all(hasattr(module, name) for name in importlib.import_module(f"{package}.base").PROTOCOL)


@dataclass(frozen=True)
class Plugin:
    """What `{name: x, ...}` means: the module x of a package, and the other keys as its `Config`."""

    name: str
    module: ModuleType
    config: Any

    def __reduce__(self) -> Any:  # a module goes to another process by its name
        return _plugin, (self.name, self.module.__name__, self.config)


def _plugin(name: str, module: str, config: Any) -> Plugin:
    return Plugin(name, importlib.import_module(module), config)


class PluginFrom:
    """Field type of a plug-in that a recipe names: `method: Annotated[Plugin, PluginFrom("methods")]`."""

    def __init__(self, *packages: str) -> None:
        self.packages = packages

    def parse(self, value: Any) -> Plugin:
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            raise PydanticCustomError("part", "should be a mapping with a 'name'")
        try:
            module = resolve(self.packages, value["name"])
        except UserError as error:
            raise PydanticCustomError("name", "{reason}", {"reason": str(error)}) from error
        return Plugin(value["name"], module, module.Config(**{k: v for k, v in value.items() if k != "name"}))

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        dump = core_schema.plain_serializer_function_ser_schema(
            lambda part: {"name": part.name, **part.config.model_dump(mode="json")}
        )
        return core_schema.no_info_plain_validator_function(self.parse, serialization=dump)


def load(path: Path | str, overrides: Sequence[str], schema: type[Schema]) -> Schema:
    """Read the recipe at `path`, apply overrides such as "train.steps=20", and check it against `schema`.

    Raises:
        UserError: one line with file, line, key and remedy, e.g.
            "recipes/x.yaml:7: data.clps: unknown key, did you mean 'clips'?"
    """
    path = Path(path)
    try:
        text = path.read_text()
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
        origins: dict[Place, str] = {}
        if isinstance(node, yaml.MappingNode):
            _locate(node, (), path, origins)
    except FileNotFoundError:
        near = get_close_matches(str(path), [str(p) for p in path.parent.glob("*.yaml")], n=1)
        remedy = f"did you mean {near[0]!r}?" if near else "name a recipe"
        raise UserError(f"{path}: does not exist, {remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: is not YAML ({error.problem})") from error
    except UNREADABLE as error:  # a control character, 2026-13-01, {[a]: 1}
        raise UserError(f"{path}: is not YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}:1: should be a mapping of keys to values")
    for override in overrides:
        _override(values, override, origins)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        _explain(error, values, schema, origins)


def dump(model: BaseModel) -> str:
    """The resolved recipe as YAML that `load` reads back to an equal model."""
    return yaml.safe_dump(model.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=100)


def arguments(parser: argparse.ArgumentParser, words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line on which overrides may also follow options, as in "make x.yaml --workers 2 seed=1".

    argparse alone takes `overrides` only up to the first option. Anything else that is too much ends the program.
    """
    options, more = parser.parse_known_args(words)
    if wrong := [word for word in more if word.startswith("-") or not hasattr(options, "overrides")]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if more:
        options.overrides += more
    return options


def _suggest(name: str, names: Sequence[str]) -> str:
    near = get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose from: {', '.join(sorted(names)) or '(nothing)'}"


def _locate(node: yaml.Node, place: Place, path: Path, origins: dict[Place, str]) -> None:
    """Note for every key and item of the document the line where it stands."""
    origins.setdefault(place, f"{path}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*place, key.value)
            if inner in origins:
                raise UserError(f"{path}:{key.start_mark.line + 1}: {_dotted(inner)}: stands here twice; keep one")
            origins[inner] = f"{path}:{key.start_mark.line + 1}"
            _locate(value, inner, path, origins)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _locate(value, (*place, index), path, origins)


def _override(values: dict[str, Any], override: str, origins: dict[Place, str]) -> None:
    name, equals, text = override.partition("=")
    if not equals or not all(name.split(".")):
        raise UserError(f"{override}: an override is written key=value, as in train.steps=20")
    *parents, last = place = tuple(name.split("."))
    for depth, key in enumerate(parents, 1):
        inner = values.get(key)
        if inner is None:
            inner = values[key] = {}
        if not isinstance(inner, dict):
            raise UserError(f"{override}: {_dotted(place[:depth])} is not a mapping")
        values = inner
    try:
        values[last] = yaml.safe_load(text)
    except UNREADABLE as error:
        raise UserError(f"{override}: the value is not YAML") from error
    for known in [p for p in origins if p[: len(place)] == place]:
        del origins[known]
    for depth in range(1, len(place) + 1):
        origins.setdefault(place[:depth], override)


def _dotted(place: Place) -> str:
    return ".".join(map(str, place))


def _explain(error: ValidationError, values: Any, schema: type[BaseModel], origins: dict[Place, str]) -> NoReturn:
    """Raise the first complaint as one line; an unknown key comes first, for it is often why another is missing."""
    errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first, place = errors[0], errors[0]["loc"]
    message = "should be a mapping" if first["type"] == "model_type" else first["msg"][:1].lower() + first["msg"][1:]
    if first["type"] == "extra_forbidden":
        message = f"unknown key, {_suggest(str(place[-1]), _keys(schema, place[:-1], values))}"
    elif first["type"] == "missing":
        message = "is missing"
    else:
        place = _written(place, values)
        if first["type"] not in ("part", "name"):
            message += f", not {first['input']!r}"
    origin = next(origins[place[:n]] for n in range(len(place), -1, -1) if place[:n] in origins)
    raise UserError(f"{origin}: {_dotted(place)}: {message}") from error


def _written(place: Place, values: Any) -> Place:
    """The part of `place` that stands in the recipe: for a union, pydantic adds the name of the branch."""
    for depth, key in enumerate(place):
        try:
            values = values[key]
        except (KeyError, IndexError, TypeError):
            return place[:depth]
    return place


def _keys(schema: type[BaseModel], place: Place, values: Any) -> list[str]:
    """The keys allowed at `place`."""
    if not place:
        return list(schema.model_fields)
    if isinstance(place[0], int):  # an item of a list
        return _keys(schema, place[1:], values[place[0]])
    field = schema.model_fields[place[0]]
    kinds = [field.annotation, *get_args(field.annotation)]
    marks = [*field.metadata, *(mark for kind in kinds for mark in getattr(kind, "__metadata__", ()))]
    plugin = next((mark for mark in marks if isinstance(mark, PluginFrom)), None)
    inner, rest = values[place[0]], place[1:]
    if plugin is not None:
        if rest and isinstance(rest[0], int):  # one of several parts
            inner, rest = inner[rest[0]], rest[1:]
        return ["name", *_keys(resolve(plugin.packages, inner["name"]).Config, rest, inner)]
    models = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
    return _keys(models[0], rest, inner) if models else []
