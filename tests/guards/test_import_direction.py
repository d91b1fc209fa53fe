"""Who may import whom, read from the syntax tree of every source file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("mmalign", "vision_rewards", "trainers", "eval", "assets")
# Where the verbs are put together: siblings are allowed here, inside functions only.
FRONT = ("mmalign/api.py", "mmalign/cli.py", "mmalign/commands/")
# What scorers may know of the core.
CONTRACTS = (
    "types", "protocols", "reward_info", "registry", "shapes", "assets",  # what they are made of
    "config", "pictures", "prompts", "runtime",  # how commands read, write and report
)  # fmt: skip


@dataclass(frozen=True)
class Import:
    """One import: the module, and whether it happens only when a function runs."""

    module: str
    line: int
    lazy: bool
    plain: bool  # ``import x``, not ``from x import y``


def imports_of(tree: ast.AST, lazy: bool = False) -> Iterator[Import]:
    """Every import below ``tree``, ``importlib.import_module("...")`` included."""
    for node in ast.iter_child_nodes(tree):
        inner = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            inner = True
        if isinstance(node, ast.Import):
            yield from (Import(a.name, node.lineno, lazy, True) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            for alias in node.names:  # ``from mmalign import types`` is an import of mmalign.types
                yield Import(f"{node.module}.{alias.name}", node.lineno, lazy, False)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
            yield from (Import(str(n), node.lineno, lazy, False) for n in names)
        yield from imports_of(node, inner)


def verdict(path: str, found: Import) -> str | None:
    """What is wrong with an import of our own packages in the file ``path``, if anything."""
    package, (target, *rest) = path.split("/")[0], found.module.split(".")
    if target not in PACKAGES:
        return None
    if found.plain and target in ("eval", "trainers") and not rest:
        return f"write `from {target}.x import y`"
    if package == target:
        return None
    if package == "mmalign":
        if not path.startswith(FRONT):
            return "mmalign imports no sibling"
        return None if found.lazy else "only inside a function"
    if target == "assets":
        return "go through mmalign.assets.asset"
    if target == "mmalign" and rest[:1] in (["api"], ["cli"], ["commands"]):
        return "the front end imports the parts, never the reverse"
    allowed = {"vision_rewards": ("mmalign",), "trainers": ("mmalign", "vision_rewards")}
    if target not in allowed.get(package, ("mmalign", "vision_rewards")):
        return f"{package} may not know {target}"
    if package == "vision_rewards" and rest[:1] and rest[0] not in CONTRACTS:
        return f"scorers may use only mmalign's {', '.join(CONTRACTS)}"
    return None


def test_imports_follow_the_design():
    wrong = []
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            path = file.relative_to(ROOT).as_posix()
            for found in imports_of(ast.parse(file.read_text(encoding="utf-8"))):
                reason = verdict(path, found)
                if reason:
                    wrong.append(f"{path}:{found.line}: {found.module}: {reason}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("path", "source", "allowed"),
    [
        ("mmalign/x.py", "from mmalign.types import Media", True),
        ("mmalign/x.py", "def f():\n    from eval.harness import y", False),
        ("mmalign/api.py", "from eval.harness import y", False),
        ("mmalign/api.py", "def f():\n    from eval.harness import y", True),
        ("mmalign/api.py", "if TYPE_CHECKING:\n    from eval.harness import y", True),
        ("mmalign/x.py", "import importlib\nimportlib.import_module('trainers.loop')", False),
        ("vision_rewards/x.py", "from mmalign.types import Score", True),
        ("vision_rewards/x.py", "from mmalign import types", True),
        ("vision_rewards/x.py", "from mmalign.policies.sd3 import SD3Policy", False),
        ("vision_rewards/x.py", "from trainers.loop import train", False),
        ("trainers/x.py", "from vision_rewards.shapes import y", True),
        ("trainers/x.py", "from eval.harness import y", False),
        ("trainers/x.py", "from mmalign.api import train", False),
        ("eval/x.py", "from trainers.loop import train", False),
        ("eval/x.py", "import eval", False),
        ("eval/x.py", "import assets", False),
        ("eval/x.py", "import numpy as np", True),
    ],
)
def test_the_guard_itself(path, source, allowed):
    reasons = [verdict(path, found) for found in imports_of(ast.parse(source))]
    assert all(r is None for r in reasons) is allowed
