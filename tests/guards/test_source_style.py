"""Sizes, docstrings, annotations and text of the sources."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("mmalign", "vision_rewards", "trainers", "eval")
Function = ast.FunctionDef | ast.AsyncFunctionDef

MAX_FILE_LINES = 400
MAX_MEDIAN_FUNCTION = 14
LONG_FUNCTION = 40
MAX_LONG_SHARE = 0.10


def sources() -> Iterator[tuple[str, ast.Module, int]]:
    """Path, tree and number of lines of every source file."""
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            text = file.read_text(encoding="utf-8")
            yield file.relative_to(ROOT).as_posix(), ast.parse(text), text.count("\n")


def functions(tree: ast.AST) -> Iterator[Function]:
    """Every function and method, nested ones too."""
    yield from (n for n in ast.walk(tree) if isinstance(n, Function))


def length(function: Function) -> int:
    """Lines from ``def`` to the end, docstring included."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def test_files_are_short():
    wrong = [f"{path}: {lines} lines" for path, _, lines in sources() if lines > MAX_FILE_LINES]
    assert not wrong, "\n".join(wrong)


def test_functions_are_short():
    lengths = {
        f"{path}:{function.lineno} {function.name}": length(function)
        for path, tree, _ in sources()
        for function in functions(tree)
    }
    median = statistics.median(lengths.values())
    long = {name: n for name, n in lengths.items() if n > LONG_FUNCTION}
    listing = "\n".join(f"{n:4d}  {name}" for name, n in sorted(long.items(), key=lambda i: -i[1]))
    assert median <= MAX_MEDIAN_FUNCTION, f"median {median}"
    assert len(long) <= MAX_LONG_SHARE * len(lengths), f"{len(long)} of {len(lengths)}:\n{listing}"


def contract_methods() -> set[str]:
    """Method names documented once, in the protocols that others implement."""
    tree = ast.parse((ROOT / "mmalign" / "protocols.py").read_text(encoding="utf-8"))
    return {f.name for f in functions(tree)}


def public(tree: ast.Module) -> Iterator[tuple[str, ast.ClassDef | Function, bool]]:
    """Public classes, functions and methods with their name and whether they are methods."""
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, *Function.__args__)) and not node.name.startswith("_"):
            yield node.name, node, False
            if isinstance(node, ast.ClassDef):
                for item in node.body:
                    if isinstance(item, Function) and not item.name.startswith("_"):
                        yield f"{node.name}.{item.name}", item, True


def test_public_names_have_docstrings():
    contracts = contract_methods()
    # nn.Module's own entry point is documented by the class.
    known = contracts | {"forward"}
    wrong = []
    for path, tree, _ in sources():
        if tree.body and not ast.get_docstring(tree):
            wrong.append(f"{path}: module")
        for name, node, method in public(tree):
            if not ast.get_docstring(node) and not (method and node.name in known):
                wrong.append(f"{path}:{node.lineno}: {name}")
    assert not wrong, "no docstring:\n" + "\n".join(wrong)


def unannotated(function: Function, method: bool) -> list[str]:
    """Parameters without a type, and ``return`` where the result has none."""
    args = function.args
    static = any(ast.unparse(d) == "staticmethod" for d in function.decorator_list)
    positional = [*args.posonlyargs, *args.args][1 if method and not static else 0 :]
    every = [*positional, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]
    missing = [a.arg for a in every if a.annotation is None]
    return missing + (["return"] if function.returns is None else [])


def test_public_functions_are_annotated():
    wrong = [
        f"{path}:{node.lineno}: {name}: {', '.join(unannotated(node, method))}"
        for path, tree, _ in sources()
        for name, node, method in public(tree)
        if isinstance(node, Function) and unannotated(node, method)
    ]
    assert not wrong, "\n".join(wrong)


def project_files() -> list[Path]:
    """Every file of the project that git knows or would add; all text sources without git."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return [p for p in map(ROOT.joinpath, done.stdout.splitlines()) if p.is_file()]
    folders = (*PACKAGES, "assets", "tests", "docs")
    files = (p for folder in folders for p in (ROOT / folder).rglob("*"))
    return [p for p in files if p.suffix in (".py", ".md", ".yaml")]


# Folders of somebody's machine; spelt so that this file passes its own test.
MACHINE_PATH = re.compile(r"(?<![\w./-])/(?:wor[k]|roo[t]|home/\w+|Users/\w+)(?=[/\s\"'`)]|$)")


def test_no_file_names_a_folder_of_one_machine():
    wrong = []
    for path in project_files():
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.split("\n"), 1):
            if MACHINE_PATH.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not wrong, "\n".join(wrong)
