"""Shipped files and recipes are found by name."""

from __future__ import annotations

import pytest

import mmalign.assets as assets
from mmalign.assets import AssetError, asset, assets_root, find_recipe, shipped_recipes


def test_asset_is_found():
    assert asset("__init__.py").is_file()
    assert asset("") == assets_root()


@pytest.mark.parametrize("path", ["no-such-thing", "no/such/thing.json", "__init__.pyy"])
def test_missing_asset_lists_neighbours(path):
    with pytest.raises(AssetError, match=f"no asset '{path}'.*holds:"):
        asset(path)


def test_asset_stays_inside():
    with pytest.raises(AssetError, match="outside"):
        asset("../pyproject.toml")


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    folder = tmp_path / "trainers" / "recipes"
    folder.mkdir(parents=True)
    (folder / "shapes.yaml").write_text("a: 1")
    monkeypatch.setattr(assets, "_ROOT", tmp_path)
    return folder / "shapes.yaml"


@pytest.mark.parametrize("name", ["shapes", "shapes.yaml", "trainers/recipes/shapes.yaml"])
def test_recipe_by_name(shipped, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "trainers")
    assert find_recipe(name) == shipped


def test_recipe_by_path_wins(shipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes.yaml").write_text("mine: 1")
    assert find_recipe("shapes.yaml").read_text() == "mine: 1"


def test_unknown_recipe(shipped):
    text = r"no recipe 'shape'.*Did you mean 'shapes'.*Shipped: shapes"
    with pytest.raises(AssetError, match=text):
        find_recipe("shape")
    with pytest.raises(AssetError):
        find_recipe("elsewhere/shapes.yaml")


def test_shipped_recipes_are_short():
    for name, path in shipped_recipes().items():
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 40, f"recipe {name} has {len(lines)} lines"
        assert lines[0].startswith("# "), f"recipe {name} does not begin with what it does"
