"""Strict configuration: frozen dataclasses on one side, YAML on the other.

A recipe is a YAML mapping; :func:`from_dict` turns it into a dataclass and refuses whatever it
does not know, so a misspelt key never becomes a silently ignored setting.
"""

from __future__ import annotations

import collections.abc
import copy
import dataclasses
import difflib
import hashlib
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

T = TypeVar("T")

# YAML 1.1 reads 1e-4 as a string, because it lacks the dot; everybody means the number.
_EXPONENT = re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$")
_SEQUENCES = (list, tuple, collections.abc.Sequence, collections.abc.Iterable)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, its value and the fix."""


# --- mapping -> dataclass ---------------------------------------------------------------------


def from_dict(cls: type[T], mapping: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass ``cls`` from a mapping, strictly and recursively.

    Args:
        cls: a dataclass; nested dataclasses, unions, tuples, lists, mappings, literals, paths
            and scalars are understood.
        mapping: keys are field names.
        where: dotted prefix for messages.

    Raises:
        ConfigError: unknown or missing key, wrong type, or a value the dataclass itself refuses.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(_wrong(where or cls.__name__, mapping, "a mapping"))
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    _refuse_unknown(mapping, fields, where)
    _refuse_missing(mapping, fields.values(), where, cls.__name__)
    hints = typing.get_type_hints(cls)
    values = {k: _convert(hints[k], v, _join(where, k)) for k, v in mapping.items()}
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:  # the dataclass's own checks know the rule, not the place
        raise ConfigError(f"{where + ': ' if where else ''}{error}") from error


def _join(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _refuse_unknown(mapping: Mapping[str, Any], fields: Iterable[str], where: str) -> None:
    allowed = list(fields)
    for key in mapping:
        if key in allowed:
            continue
        near = difflib.get_close_matches(str(key), allowed, n=1, cutoff=0.5)
        hint = f" Did you mean '{_join(where, near[0])}'?" if near else ""
        raise ConfigError(
            f"unknown key '{_join(where, key)}'.{hint} Allowed here: {', '.join(sorted(allowed))}."
        )


def _refuse_missing(
    mapping: Mapping[str, Any], fields: Iterable[dataclasses.Field[Any]], where: str, cls: str
) -> None:
    for field in fields:
        absent = dataclasses.MISSING
        required = field.default is absent and field.default_factory is absent
        if required and field.name not in mapping:
            raise ConfigError(f"missing key '{_join(where, field.name)}', required by {cls}")


def _wrong(key: str, value: object, expected: str) -> str:
    return f"'{key}' is {value!r} ({type(value).__name__}), expected {expected}"


def _convert(hint: Any, value: Any, key: str) -> Any:
    """``value`` as ``hint`` says, or :class:`ConfigError`."""
    origin = get_origin(hint)
    if hint is Any or hint is object:
        return value
    if origin is Literal:
        return _literal(hint, value, key)
    if origin in (Union, types.UnionType):
        return _union(hint, value, key)
    if (origin or hint) in _SEQUENCES:
        return _sequence(hint, value, key)
    if (origin or hint) in _MAPPINGS:
        return _mapping(hint, value, key)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        return from_dict(typing.cast("type[Any]", hint), value, key)
    return _scalar(hint, value, key)


def _literal(hint: Any, value: Any, key: str) -> Any:
    allowed = get_args(hint)
    for option in allowed:
        if value == option and type(value) is type(option):
            return value
    near = difflib.get_close_matches(str(value), [str(a) for a in allowed], n=1, cutoff=0.5)
    hint_text = f". Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(_wrong(key, value, f"one of {', '.join(map(repr, allowed))}{hint_text}"))


def _union(hint: Any, value: Any, key: str) -> Any:
    options = [a for a in get_args(hint) if a is not type(None)]
    if value is None and len(options) < len(get_args(hint)):
        return None
    errors: list[ConfigError] = []
    # An exact type wins over a conversion: 3 stays an int under ``float | int``.
    for option in sorted(options, key=lambda o: o is not type(value)):
        try:
            return _convert(option, value, key)
        except ConfigError as error:
            errors.append(error)
    if len(errors) == 1 or isinstance(value, Mapping):
        raise errors[0]
    raise ConfigError(_wrong(key, value, _describe(hint)))


def _sequence(hint: Any, value: Any, key: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(_wrong(key, value, _describe(hint)))
    origin, args = get_origin(hint) or hint, get_args(hint)
    inner: Sequence[Any] = args[:1] * len(value) if args else (Any,) * len(value)
    if origin is tuple and args and not (len(args) == 2 and args[1] is Ellipsis):
        if len(value) != len(args):
            raise ConfigError(_wrong(key, value, f"{len(args)} values, {_describe(hint)}"))
        inner = args
    pairs = zip(inner, value, strict=True)
    items = [_convert(t, v, f"{key}.{i}") for i, (t, v) in enumerate(pairs)]
    return items if origin is list else tuple(items)


def _mapping(hint: Any, value: Any, key: str) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(_wrong(key, value, _describe(hint)))
    key_hint, value_hint = get_args(hint) or (Any, Any)
    return {
        _convert(key_hint, k, f"{key} (key)"): _convert(value_hint, v, _join(key, k))
        for k, v in value.items()
    }


def _scalar(hint: Any, value: Any, key: str) -> Any:
    if hint is float:
        if isinstance(value, str) and _EXPONENT.match(value):
            return float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif hint is Path:
        if isinstance(value, (str, Path)):
            return Path(value)
    elif (
        isinstance(hint, type)
        and isinstance(value, hint)
        and (
            hint is bool or not isinstance(value, bool)  # True is an int only to Python
        )
    ):
        return value
    raise ConfigError(_wrong(key, value, _describe(hint)))


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(a) for a in args)
    if (origin or hint) in _SEQUENCES:
        inner = ", ".join(_describe(a) for a in args if a is not Ellipsis)
        return f"a list of {inner}" if inner else "a list"
    if (origin or hint) in _MAPPINGS or dataclasses.is_dataclass(hint):
        return "a mapping"
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))


# --- dataclass -> mapping ---------------------------------------------------------------------


def to_dict(config: Any) -> Any:
    """Plain dicts, lists and scalars for a dataclass or any nesting of the same."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {k: to_dict(v) for k, v in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(v) for v in config]
    return str(config) if isinstance(config, Path) else config


def dump_yaml(config: Any) -> str:
    """A dataclass or mapping as YAML, in field order."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=88)


def config_hash(config: Any) -> str:
    """First 12 hex digits of the SHA-256 of the canonical JSON; equal content, equal hash."""
    text = json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# --- YAML -------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML with 1e-4 as a number, and duplicate keys as an error instead of the last one."""


_Loader.yaml_implicit_resolvers = {
    first: list(rules) for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def _unique_keys(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, collections.abc.Hashable) and key in seen:
            mark = key_node.start_mark
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=deep)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_keys)


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{source}{place}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from error


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ConfigError: the file is missing, is not UTF-8, is not valid YAML (with its line), or
            does not hold a mapping.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: is a folder, expected a YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    value = _parse_yaml(text, str(path))
    if not isinstance(value, dict):
        kind = "nothing" if value is None else type(value).__name__
        raise ConfigError(f"{path}: holds {kind}, expected a mapping of keys to values")
    return value


# --- overrides --------------------------------------------------------------------------------


def apply_overrides(mapping: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of ``mapping`` with ``a.b=c`` assignments applied, in order.

    Values are read as YAML (``0.1``, ``1e-4``, ``true``, ``null``, ``[1, 2]``, text). A number in
    the path indexes a list. Missing mappings on the way are created; whether their keys are
    allowed is :func:`from_dict`'s business.

    Raises:
        ConfigError: an override without ``=``, an empty key, or a path through a scalar.
    """
    result: dict[str, Any] = copy.deepcopy(dict(mapping))
    for override in overrides:
        dotted, equals, text = override.partition("=")
        keys = dotted.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(f"override {override!r} must look like key=value or a.b=value")
        _assign(result, keys, _parse_yaml(text, f"override {override!r}"), override)
    return result


def _assign(target: Any, keys: Sequence[str], value: Any, override: str) -> None:
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        place = ".".join(keys[:depth]) or "the recipe"
        if isinstance(target, list):
            if not key.isdigit() or int(key) >= len(target):
                allowed = f"a number from 0 to {len(target) - 1}"
                raise ConfigError(f"override {override!r}: {place} is a list, expected {allowed}")
            slot: Any = int(key)
        elif isinstance(target, dict):
            slot = key
            if not last and target.get(key) is None:
                target[key] = {}
        else:
            raise ConfigError(f"override {override!r}: {place} is {target!r}, which has no keys")
        if last:
            target[slot] = value
        else:
            target = target[slot]
