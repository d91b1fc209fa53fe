"""Strict configuration: what is accepted, and what each refusal says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from mmalign.config import (
    ConfigError,
    apply_overrides,
    config_hash,
    dump_yaml,
    from_dict,
    load_yaml,
    to_dict,
)


@dataclass(frozen=True, kw_only=True)
class Inner:
    learning_rate: float = 1e-4
    steps: int = 10
    kind: Literal["lora", "full"] = "lora"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be positive, got {self.steps}")


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    limit: int | None = None
    flag: bool = False
    window: tuple[int, int] = (0, 1)
    betas: tuple[float, ...] = (0.9, 0.999)
    tags: list[str] = field(default_factory=list)
    weights: Mapping[str, float] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    size: int | str = "auto"
    folder: Path | None = None
    parts: tuple[Inner, ...] = ()


FULL = {
    "name": "a",
    "inner": {"learning_rate": 1, "steps": 3, "kind": "full"},
    "limit": 5,
    "flag": True,
    "window": [1, 2],
    "betas": [0, 0.5, 1],
    "tags": ["x", "y"],
    "weights": {"r": 1, "s": 0.5},
    "options": {"anything": [1, "two"]},
    "size": 64,
    "folder": "some/where",
    "parts": [{"steps": 1}, {"steps": 2}],
}


def test_every_kind_of_field_is_built():
    config = from_dict(Outer, FULL)
    assert config.inner == Inner(learning_rate=1.0, steps=3, kind="full")
    assert isinstance(config.inner.learning_rate, float)
    assert (config.window, config.betas) == ((1, 2), (0.0, 0.5, 1.0))
    assert config.tags == ["x", "y"] and config.weights == {"r": 1.0, "s": 0.5}
    assert config.parts == (Inner(steps=1), Inner(steps=2))
    assert config.folder == Path("some/where") and config.size == 64


def test_defaults_and_null():
    config = from_dict(Outer, {"name": "a", "limit": None})
    assert config == Outer(name="a")


def test_round_trip_through_yaml(tmp_path):
    config = from_dict(Outer, FULL)
    file = tmp_path / "c.yaml"
    file.write_text(dump_yaml(config))
    assert from_dict(Outer, load_yaml(file)) == config
    assert to_dict(config)["window"] == [1, 2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nme": 1}, ["unknown key 'nme'", "Did you mean 'name'", "Allowed here", "betas"]),
        ({"inner": {"learning_rte": 1}}, ["'inner.learning_rte'", "'inner.learning_rate'", "kind"]),
        ({"parts": [{}, {"stepz": 1}]}, ["'parts.1.stepz'", "'parts.1.steps'"]),
        ({"inner": {"steps": "3"}}, ["'inner.steps'", "'3' (str)", "expected int"]),
        ({"inner": {"steps": 1.5}}, ["'inner.steps'", "1.5 (float)", "expected int"]),
        ({"inner": {"steps": True}}, ["'inner.steps'", "True (bool)", "expected int"]),
        ({"inner": {"learning_rate": "fast"}}, ["'inner.learning_rate'", "expected float"]),
        ({"inner": {"learning_rate": False}}, ["False (bool)", "expected float"]),
        ({"inner": {"kind": "lorra"}}, ["'inner.kind'", "'lorra'", "'lora', 'full'", "Did you"]),
        ({"inner": {"steps": 0}}, ["inner: steps must be positive"]),
        ({"inner": 3}, ["'inner'", "expected a mapping"]),
        ({"flag": 1}, ["'flag'", "expected bool"]),
        ({"limit": "many"}, ["'limit'", "'many'", "expected int"]),
        ({"size": 1.5}, ["'size'", "expected int or str"]),
        ({"window": [1, 2, 3]}, ["'window'", "2 values"]),
        ({"betas": "0.9"}, ["'betas'", "a list of float"]),
        ({"weights": {"r": "x"}}, ["'weights.r'", "expected float"]),
        ({"name": None}, ["'name'", "None", "expected str"]),
    ],
)
def test_refusals_name_key_value_and_expectation(change, words):
    with pytest.raises(ConfigError) as caught:
        from_dict(Outer, {"name": "a", **change})
    for word in words:
        assert word in str(caught.value)


def test_missing_key_is_named():
    with pytest.raises(ConfigError, match=r"missing key 'run.name', required by Outer"):
        from_dict(Outer, {}, where="run")


def test_yaml_reads_exponents_as_numbers(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("a: 1e-4\nb: [1E3, -2e5]\nc: '1e-4'\nd: 1e\ne: 0.5\n")
    assert load_yaml(file) == {"a": 1e-4, "b": [1000.0, -2e5], "c": "1e-4", "d": "1e", "e": 0.5}
    assert from_dict(Inner, {"learning_rate": "1e-4"}).learning_rate == 1e-4


def test_loading_does_not_change_yaml_elsewhere(tmp_path):
    import yaml

    assert yaml.safe_load("a: 1e-4\na: 2") == {"a": 2}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"a: [1\nb: 2\n", ["line 2", "not valid YAML"]),
        (b"a: 1\nb:\n  c: 1\n  c: 2\n", ["line 4", "'c' appears twice"]),
        (b"- 1\n", ["holds list", "expected a mapping"]),
        (b"", ["holds nothing"]),
        (b"a: \xff\n", ["not UTF-8 at byte 3"]),
    ],
)
def test_bad_files(tmp_path, data, words):
    file = tmp_path / "c.yaml"
    file.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        load_yaml(file)
    for word in [str(file), *words]:
        assert word in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_yaml(tmp_path)


def test_overrides_apply_in_order_and_copy():
    base = {"a": {"b": 1}, "l": [{"x": 1}, {"x": 2}]}
    result = apply_overrides(
        base, ["a.b=2", "a.c.d=1e-3", "l.1.x=[1, 2]", "t=text with spaces", "n=null", "a.b=3", "e="]
    )
    assert result == {
        "a": {"b": 3, "c": {"d": 1e-3}},
        "l": [{"x": 1}, {"x": [1, 2]}],
        "t": "text with spaces",
        "n": None,
        "e": None,
    }
    assert base == {"a": {"b": 1}, "l": [{"x": 1}, {"x": 2}]}


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("a", "must look like"),
        ("=1", "must look like"),
        ("a..b=1", "must look like"),
        ("s.x=1", "s is 3, which has no keys"),
        ("l.7=1", "a number from 0 to 0"),
        ("a=[1", "not valid YAML"),
    ],
)
def test_bad_overrides(override, word):
    with pytest.raises(ConfigError, match=word):
        apply_overrides({"s": 3, "l": [1]}, [override])


def test_hash_depends_on_content_alone():
    one, two = from_dict(Outer, FULL), from_dict(Outer, dict(reversed(FULL.items())))
    assert config_hash(one) == config_hash(two) == config_hash(to_dict(one))
    assert len(config_hash(one)) == 12
    assert config_hash(one) != config_hash(from_dict(Outer, {**FULL, "limit": 6}))
