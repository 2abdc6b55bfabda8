"""From a YAML recipe to a typed, immutable config. An unknown key is an error, and an error names its line.

A name stands for a file: `method: {name: psft, ...}` means methods/psft.py. The other keys are fields of its `Config`.
"""

import argparse
import importlib
import pkgutil
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Never, NoReturn, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError, core_schema

from posttrain.core import files
from posttrain.core.errors import Code, UserError, printable


class Strict(BaseModel):
    """A typed part of a recipe: unknown keys are refused, numbers must be finite, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what torch's generators and numpy's both take
Schema = TypeVar("Schema", bound=BaseModel)
Keys = tuple[str | int, ...]  # the path to a value: ("data", "clips", 0)
SHIPPED = Path(__file__).parents[1] / "recipes"  # the package's recipes; in a checkout, a link to recipes/
LARGEST = 2**20  # characters of a recipe
MOST = 20_000  # keys and values of a recipe, after its anchors are written out
# what PyYAML raises for a control character, for 2026-13-01, for {[a]: 1}, for !!timestamp x, for !!bool x, for &a [*a]
UNREADABLE = (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but 1e3 is a number, as in YAML 1.2, and a whole number has at most 64 bits."""


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: the text "1e3" in quotes."""


def _whole(loader: _Loader, node: yaml.ScalarNode) -> int:
    if not -(2**63) <= (number := loader.construct_yaml_int(node)) < 2**63:
        raise yaml.MarkedYAMLError(problem="a number has more than 64 bits", problem_mark=node.start_mark)
    return number


for _reader_or_writer in (_Loader, _Dumper):
    _reader_or_writer.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
    )
_Loader.add_constructor("tag:yaml.org,2002:int", _whole)


def resolve(packages: str | Sequence[str], name: str) -> ModuleType:
    """The plug-in `name` of one of these packages ("methods" stands for posttrain.methods).

    A plug-in is a module that has every name in `PROTOCOL` of its package's base.py. Other modules are not offered.

    Raises:
        UserError: there is no such plug-in; the message lists those that exist.
    """
    packages = [packages] if isinstance(packages, str) else packages
    full = [_package(package) for package in packages]
    for package in full:
        if name in _modules(package) and _is_plugin(module := importlib.import_module(f"{package}.{name}"), package):
            return module
    offered = plugins(*packages)
    searched = " and ".join(package.replace(".", "/") for package in full)
    raise UserError(f"{searched}: has no {printable(repr(name))}, {_suggest(name, offered)}", "unknown_name")


def plugins(*packages: str) -> list[str]:
    """The names that `resolve` accepts."""
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
    """The value of `{name: x, ...}`: the module x of a package, and the other keys as its `Config`."""

    name: str
    module: ModuleType
    config: Any

    def __reduce__(self) -> Any:  # a module cannot be pickled, so its name is sent to another process
        return _plugin, (self.name, self.module.__name__, self.config)


def _plugin(name: str, module: str, config: Any) -> Plugin:
    return Plugin(name, importlib.import_module(module), config)


class PluginFrom:
    """Field type of a plug-in that a recipe names: `method: Annotated[Plugin, PluginFrom("methods")]`."""

    def __init__(self, *packages: str) -> None:
        self.packages = packages

    def parse(self, value: Any) -> Plugin:
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            raise PydanticCustomError("required", "should be a mapping with a 'name'")
        try:
            module = resolve(self.packages, value["name"])
        except UserError as error:
            raise PydanticCustomError("unknown_name", "{reason}", {"reason": str(error)}) from error
        config = module.Config.model_validate({k: v for k, v in value.items() if k != "name"})
        return Plugin(value["name"], module, config)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        dump = core_schema.plain_serializer_function_ser_schema(
            lambda part: {"name": part.name, **part.config.model_dump(mode="json")}
        )
        return core_schema.no_info_plain_validator_function(self.parse, serialization=dump)


def load(path: Path | str, overrides: Sequence[str], schema: type[Schema]) -> Schema:
    """Read the recipe at `path`, apply overrides such as "train.steps=20", and check it against `schema`.

    If `path` begins with recipes/ and does not exist here, the recipe in the package is read.

    Raises:
        UserError: one line with file, line, key and remedy, e.g.
            "recipes/x.yaml:7: data.clps: unknown key, did you mean 'clips'?"; its field is the key, "data.clps".
            Codes: missing, format, duplicate, unknown_key, unknown_name, required, value, and those with which a
            schema's own checks raise PydanticCustomError.
    """
    path, origins = Path(path), dict[Keys, str]()
    values = _parse(_text(path), (), lambda line: f"{path}:{line}", origins, "")
    if not isinstance(values, dict):
        raise UserError(f"{path}:1: should be a mapping of keys to values", "format")
    for override in overrides:
        _override(values, override, origins)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        _explain(error, values, schema, origins)


def _text(path: Path) -> str:
    try:
        text = files.read_text(shipped(path))
    except UserError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        near = get_close_matches(str(path), [str(p) for p in path.parent.glob("*.yaml")], n=1)
        remedy = f"did you mean {near[0]!r}?" if near else "name a recipe"
        raise UserError(f"{printable(str(path), 300)}: does not exist, {remedy}", "missing") from None
    if len(text) > LARGEST:
        raise UserError(f"{path}: is longer than {LARGEST} characters; name a recipe, or shorten it", "format")
    return text


def shipped(path: Path) -> Path:
    """`path` itself or, if it does not exist and begins with recipes/, the recipe in the package."""
    if path.parts[:1] != (SHIPPED.name,) or ".." in path.parts or path.exists():
        return path
    return own if (own := SHIPPED.joinpath(*path.parts[1:])).is_file() else path


def _parse(text: str, keys: Keys, where: Callable[[int], str], origins: dict[Keys, str], field: str) -> Any:
    """The value of a YAML text, which stands at `keys` of a recipe; writes the line of each key into `origins`.

    Raises:
        UserError: the text is not YAML, or has too many values. The error's field is `field`.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _locate(node, keys, where, origins)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{where(line)}: is not YAML ({printable(error.problem)})", "format", field) from error
    except UNREADABLE as error:
        reason = "an anchor contains itself" if isinstance(error, RecursionError) else str(error).partition("\n")[0]
        raise UserError(f"{where(0).removesuffix(':0')}: is not YAML ({printable(reason)})", "format", field) from error


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted keys: {"a": {"b": 1}} is {"a.b": 1}."""
    if not isinstance(value, dict):
        return {key: value}
    return {k: v for name, part in value.items() for k, v in flat(part, f"{key}.{name}" if key else name).items()}


def dump(model: BaseModel) -> str:
    """The resolved recipe as YAML that `load` reads back to an equal model."""
    values = model.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100)


class Parser(argparse.ArgumentParser):
    """A command line parser whose error messages are short."""

    def error(self, message: str) -> Never:
        super().error(printable(message, 300))


def arguments(parser: argparse.ArgumentParser, words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line on which overrides may also follow options, as in "make x.yaml --workers 2 seed=1".

    argparse itself takes `overrides` only before the first option. Any other unknown word ends the program.
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


def _locate(node: yaml.Node, keys: Keys, where: Callable[[int], str], origins: dict[Keys, str]) -> None:
    """Write the line of every key and item of the document into `origins`."""
    line = where(node.start_mark.line + 1)
    if len(origins) >= MOST:
        raise UserError(f"{line}: has more than {MOST} keys and values; shorten it", "format")
    origins.setdefault(keys, line)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key is not text", problem_mark=key.start_mark)
            inner, line = (*keys, key.value), where(key.start_mark.line + 1)
            if inner in origins:
                raise UserError(f"{line}: {_dotted(inner)}: is given twice; keep one", "duplicate", _dotted(inner))
            origins[inner] = line
            _locate(value, inner, where, origins)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _locate(value, (*keys, index), where, origins)


def _override(values: dict[str, Any], override: str, origins: dict[Keys, str]) -> None:
    name, equals, text = override.partition("=")
    shown = printable(override)
    if not equals or not all(name.split(".")):
        raise UserError(f"{shown}: an override has the form key=value, as in train.steps=20", "value")
    *parents, last = keys = tuple(name.split("."))
    for depth, key in enumerate(parents, 1):
        inner = values.get(key)
        if inner is None:
            inner = values[key] = {}
        if not isinstance(inner, dict):
            outer = _dotted(keys[:depth])
            raise UserError(f"{shown}: {outer} is not a mapping", "value", outer)
        values = inner
    for known in [p for p in origins if p[: len(keys)] == keys]:
        del origins[known]
    values[last] = _parse(text, keys, lambda line: shown, origins, name)
    for depth in range(1, len(keys) + 1):
        origins.setdefault(keys[:depth], shown)


def _dotted(keys: Keys) -> str:
    return ".".join(printable(str(key)) for key in keys)


def _explain(error: ValidationError, values: Any, schema: type[BaseModel], origins: dict[Keys, str]) -> NoReturn:
    """Raise the first error as one line; an unknown key goes first, because it is often why another key is missing."""
    errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first, keys = errors[0], errors[0]["loc"]
    message = first["msg"][:1].lower() + first["msg"][1:]
    code: Any = "value"
    if first["type"] == "extra_forbidden":
        code, keys = "unknown_key", _written(keys, values)
        message = f"unknown key, {_suggest(str(keys[-1]), _fields(schema, keys[:-1], values))}"
    elif first["type"] == "missing":
        message, code, keys = "is missing", "required", (*_written(keys[:-1], values), keys[-1])
    else:
        keys = _written(keys, values)
        if first["type"] in get_args(Code):  # raised by our own validators, with a full message
            code = first["type"]
        elif first["type"] != "part":
            message = SHORTER.get(first["type"], message) + f", not {printable(repr(first['input']))}"
            if first["type"] in ("list_type", "tuple_type") and isinstance(first["input"], str):
                message = f"should be a list; write [{printable(first['input'])}]"
    origin = next(origins[keys[:n]] for n in range(len(keys), -1, -1) if keys[:n] in origins)
    raise UserError(": ".join(filter(None, (origin, _dotted(keys), message))), code, _dotted(keys)) from error


SHORTER = {  # pydantic's messages in fewer words
    "model_type": "should be a mapping",
    "dict_type": "should be a mapping",
    "list_type": "should be a list, as in [a, b]",
    "tuple_type": "should be a list, as in [a, b]",
    "int_parsing": "should be a whole number",
    "int_type": "should be a whole number",
    "int_from_float": "should be a whole number",
    "int_parsing_size": "should be a whole number of at most 64 bits",
    "float_parsing": "should be a number",
    "float_type": "should be a number",
    "finite_number": "should be a finite number",
    "bool_parsing": "should be true or false",
    "bool_type": "should be true or false",
    "string_type": "should be text",
    "invalid_key": "should have text as keys",
}


def _written(keys: Keys, values: Any) -> Keys:
    """The part of pydantic's `keys` that is in the recipe; for a union, pydantic adds the name of a branch."""
    existing: Keys = ()
    for key in keys:
        try:
            values = values[key]
        except (KeyError, IndexError, TypeError):
            continue
        existing += (key,)
    return existing


def _fields(schema: type[BaseModel], keys: Keys, values: Any) -> list[str]:
    """The names of the keys that are allowed below `keys` of a recipe."""
    if not keys:
        return list(schema.model_fields)
    if isinstance(keys[0], int):  # an item of a list
        return _fields(schema, keys[1:], values[keys[0]])
    field = schema.model_fields[keys[0]]
    types = [field.annotation, *get_args(field.annotation)]
    marks = [*field.metadata, *(mark for type_ in types for mark in getattr(type_, "__metadata__", ()))]
    plugin = next((mark for mark in marks if isinstance(mark, PluginFrom)), None)
    inner, rest = values[keys[0]], keys[1:]
    if plugin is not None:
        if rest and isinstance(rest[0], int):  # one of several
            inner, rest = inner[rest[0]], rest[1:]
        return ["name", *_fields(resolve(plugin.packages, inner["name"]).Config, rest, inner)]
    models = [type_ for type_ in types if isinstance(type_, type) and issubclass(type_, BaseModel)]
    return _fields(models[0], rest, inner) if models else []
