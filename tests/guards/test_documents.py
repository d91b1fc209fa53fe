"""What the documents tell people to type exists."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmalign import cli
from mmalign.assets import find_recipe
from mmalign.registry import BENCHMARKS, REWARD_BENCHMARKS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
HEADINGS = ("What it measures", "How it is computed", "Known traps", "Reference scores")
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")


def blocks(document: Path, *languages: str) -> Iterator[str]:
    """Fenced code of the given languages."""
    for language, code in FENCE.findall(document.read_text(encoding="utf-8")):
        if language in languages:
            yield code


def shell_commands() -> Iterator[tuple[str, list[str]]]:
    """``(document, words)`` of every command in a shell block, continuation lines joined."""
    for document in DOCUMENTS:
        for code in blocks(document, "bash", "sh", "console"):
            for line in code.replace("\\\n", " ").splitlines():
                for part in line.removeprefix("$ ").split("&&"):
                    words = shlex.split(part, comments=True)
                    if words:
                        yield document.relative_to(ROOT).as_posix(), words


COMMANDS = list(shell_commands())


def test_documents_hold_commands():
    assert any(words[0] == "mmalign" for _, words in COMMANDS)
    assert ("README.md", ["make", "quickstart"]) in COMMANDS
    assert ("README.md", ["make", "test"]) in COMMANDS


@pytest.mark.parametrize(
    ("document", "words"), [c for c in COMMANDS if c[1][0] == "mmalign"], ids=lambda v: str(v)[:60]
)
def test_command_parses(document, words):
    try:
        args = cli.parse(words[1:])
    except SystemExit as stop:
        assert stop.code == 0, f"{document}: {' '.join(words)} does not parse"
        return
    recipe = getattr(args, "recipe", None)
    if recipe and (recipe.startswith("trainers/recipes/") or "." not in recipe):
        assert find_recipe(recipe).is_file()


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    for document, words in COMMANDS:
        if words[0] == "make":
            asked = {w for w in words[1:] if "=" not in w}
            assert asked <= targets, f"{document}: no target {asked - targets}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_and_python(document):
    text = document.read_text(encoding="utf-8")
    for link in LINK.findall(FENCE.sub("", text)):
        if "://" not in link and not link.startswith("mailto:"):
            assert (document.parent / link).exists(), f"{document.name}: no {link}"
    for code in blocks(document, "python"):
        ast.parse(code)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 250


def linked_from(page: Path) -> set[Path]:
    """The files that a page links to."""
    links = LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    return {(page.parent / link).resolve() for link in links if "://" not in link}


def test_every_document_is_reachable_from_the_index():
    docs = ROOT / "docs"
    missing = {p.name for p in docs.glob("*.md")} - {"README.md"}
    missing -= {p.name for p in linked_from(docs / "README.md")}
    inner = {page.parent for page in docs.rglob("*.md")} - {docs}
    for folder in inner:  # the page of its name is its index
        pages = set(folder.rglob("*.md")) - linked_from(docs / f"{folder.name}.md")
        missing |= {p.relative_to(docs).as_posix() for p in pages}
    assert not missing, f"no index links {sorted(missing)}"


@pytest.mark.parametrize(
    ("folder", "names"),
    [
        ("benchmarks", {e.name for e in BENCHMARKS}),
        ("reward-benchmarks", {e.name for e in REWARD_BENCHMARKS}),
    ],
)
def test_every_benchmark_has_its_page(folder, names):
    pages = {p.stem: p for p in (ROOT / "docs" / folder).glob("*.md")}
    assert sorted(pages) == sorted(names)
    for name, page in pages.items():
        text = page.read_text(encoding="utf-8")
        sections = re.split(r"^## ", text, flags=re.MULTILINE)
        said = {part.partition("\n")[0]: part.partition("\n")[2].strip() for part in sections[1:]}
        assert text.startswith(f"# {name}\n") and f"--benchmark {name} " in text, page
        assert tuple(said) == HEADINGS, page
        assert all(len(words) > 10 for words in said.values()), page


def test_the_list_of_rewards_is_complete():
    from mmalign.commands.list import memory_text
    from vision_rewards.cards import CARDS

    text = (ROOT / "docs" / "rewards-list.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert sorted(row.split("`")[1] for row in rows) == sorted(info.name for _, info in CARDS)
    for _, info in CARDS:
        (row,) = (r for r in rows if r.startswith(f"| `{info.name}`"))
        assert info.summary in row and info.licence in row and info.source in row, info.name
        assert f"| {memory_text(info)} | " in row and info.checkpoint in row, info.name
