"""Where shipped data lives, the same in a checkout and in an installed wheel."""

from __future__ import annotations

import difflib
from pathlib import Path

# The packages of the suite are siblings in both layouts. Going through the file system and not
# through ``import assets`` keeps a folder of that name in the working directory out of the way.
_ROOT = Path(__file__).resolve().parents[1]


class AssetError(FileNotFoundError):
    """A shipped file or recipe that is not there."""

    def __str__(self) -> str:
        return str(self.args[0])


def assets_root() -> Path:
    """The folder of everything :func:`asset` can find."""
    return _ROOT / "assets"


def asset(path: str) -> Path:
    """The shipped file or folder ``path``, relative to the assets folder (``"prompts/a.txt"``).

    Raises:
        AssetError: nothing there; the message lists what the nearest existing folder holds.
    """
    root = assets_root()
    target = (root / path).resolve()
    if not target.is_relative_to(root):
        raise AssetError(f"asset {path!r} points outside the assets folder")
    if target.exists():
        return target
    folder = next(p for p in target.parents if p.is_dir() or p == root.parent)
    raise AssetError(f"no asset {path!r}. {_neighbours(folder, target.name)}")


def _neighbours(folder: Path, name: str) -> str:
    names = sorted(p.name for p in folder.glob("*") if not p.name.startswith(("_", ".")))
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"{hint}{folder} holds: {shown or 'nothing'}."


def shipped_recipes() -> dict[str, Path]:
    """Name to file of every recipe that ships with the suite."""
    folder = _ROOT / "trainers" / "recipes"
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def find_recipe(recipe: str | Path) -> Path:
    """A recipe by path, or by the name of a shipped one, with or without ``.yaml``.

    Raises:
        AssetError: neither; the message lists the shipped recipes.
    """
    path = Path(recipe)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    # ``trainers/recipes/x.yaml`` is how the documentation writes it; it works from anywhere.
    bare = str(path.parent) in (".", "trainers/recipes", "recipes")
    name = path.stem if path.suffix in (".yaml", ".yml") else path.name
    if bare and name in shipped:
        return shipped[name]
    near = difflib.get_close_matches(name, shipped, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    known = ", ".join(shipped) or "none"
    raise AssetError(f"no recipe {str(recipe)!r}: not a file, not shipped.{hint} Shipped: {known}.")
