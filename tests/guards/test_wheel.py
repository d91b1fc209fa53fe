"""The wheel holds what it should, and an installed one finds its files."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("mmalign", "vision_rewards", "trainers", "eval", "assets")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A freshly built wheel."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder the wheel was installed into."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-index", "--no-compile", "--target", str(target), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def package_files() -> set[str]:
    """Every file of the packages in the checkout that is meant to ship."""
    files = (p for package in PACKAGES for p in (ROOT / package).rglob("*") if p.is_file())
    return {p.relative_to(ROOT).as_posix() for p in files if p.suffix not in (".pyc", ".pyo")}


def test_wheel_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    shipped = {n for n in names if ".dist-info/" not in n}
    assert shipped == package_files()
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in names)
    assert {n.split("/")[0] for n in shipped} == set(PACKAGES)


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
        entries = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert "Requires-Python: >=3.10" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert "mmalign = mmalign.cli:main" in entries


PROBE = """
import json, mmalign
from mmalign.assets import asset, assets_root, find_recipe, shipped_recipes
print(json.dumps({
    "package": mmalign.__file__,
    "assets": sorted(p.relative_to(assets_root()).as_posix() for p in asset("").rglob("*")
                     if p.is_file() and p.suffix != ".pyc"),
    "recipes": {name: find_recipe(name).read_text() for name in shipped_recipes()},
}))
"""


def test_installed_wheel_finds_its_files(installed, tmp_path, python):
    (tmp_path / "assets").mkdir()  # a folder of the same name must not get in the way
    (tmp_path / "assets" / "__init__.py").write_text("")
    done = python("-c", PROBE, cwd=tmp_path, path=installed)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert Path(found["package"]).is_relative_to(installed)
    expected = {n.removeprefix("assets/") for n in package_files() if n.startswith("assets/")}
    assert set(found["assets"]) == expected
    recipes = (ROOT / "trainers" / "recipes").glob("*.yaml")
    assert found["recipes"] == {p.stem: p.read_text(encoding="utf-8") for p in recipes}


def test_installed_command_runs(installed, tmp_path, cli):
    done = cli("list", cwd=tmp_path, path=installed)
    assert done.returncode == 0, done.stderr
    assert "best_of_n" in done.stdout


def test_extras_match_what_doctor_tells():
    tomllib = pytest.importorskip("tomllib")
    from mmalign.commands.doctor import EXTRAS
    from mmalign.runtime.versions import CORE_PACKAGES

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(requirements: list[str]) -> tuple[str, ...]:
        return tuple(r.partition(">")[0].partition("=")[0].strip() for r in requirements)

    extras = {k: names(v) for k, v in project["optional-dependencies"].items() if k != "all"}
    assert extras == EXTRAS
    assert names(project["dependencies"]) == CORE_PACKAGES
