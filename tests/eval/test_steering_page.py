"""The page of a steering run: trees as the record says, nothing fetched, every picture shown."""

from __future__ import annotations

import json

import pytest
from chromium import CHROMIUM, Chromium
from html_page import Page
from PIL import Image

from eval.family_tree import draw, family_tree
from eval.steering_page import differences, steering_report

EVIL = "<script>alert('x')</script> & \"quotes\""


def candidates(*scores, **more):
    ranked = sorted((s for s in scores if s is not None), reverse=True)
    return [
        {"seed": i, "score": s, "rank": None if s is None else 1 + ranked.index(s), **more}
        for i, s in enumerate(scores)
    ]


PARTICLES = {
    "candidates": candidates(0.1, 0.9, 0.8),
    "chosen": 1,
    "trace": [
        {"event": "visit", "step": 3, "steps": 9, "values": [0.1, 0.7, None],
         "effective_size": 1.2, "ancestors": [1, 1, 0]},
        {"event": "visit", "step": 6, "steps": 9, "values": [0.6, 0.8, 0.2],
         "effective_size": 2.5, "ancestors": [0, 1, 1]},
        {"event": "last", "step": 9, "steps": 9, "values": [0.1, 0.9, 0.8],
         "effective_size": 2.9},
    ],
}  # fmt: skip
FORKS = {
    "candidates": candidates(0.9, 0.8),
    "chosen": 0,
    "trace": [
        {"event": "fork", "step": 2, "steps": 9, "values": [0.1, 0.2, 0.3, None],
         "parents": [0, 0, 1, 1], "kept": [2, 1]},
        {"event": "fork", "step": 4, "steps": 9, "values": [0.4, 0.5, 0.6, 0.1],
         "parents": [0, 0, 1, 1], "kept": [2, 1]},
    ],
}  # fmt: skip
PICKS = {
    "candidates": candidates(0.9, 0.8),
    "chosen": 0,
    "trace": [
        {"event": "pick", "step": k, "steps": 9, "values": [[0.1, 0.2], [0.4, 0.3]],
         "picked": [1, 0]} for k in (1, 2)
    ],
}  # fmt: skip
WALK = {
    "candidates": [
        {**c, "iteration": k, "parent": p}
        for c, (k, p) in zip(
            candidates(0.1, 0.0, 0.5, 0.4, 0.2), [(0, None), (1, 0), (1, 0), (2, 2), (2, 2)],
            strict=True,
        )
    ],
    "chosen": 2,
    "trace": [{"event": "look", "iteration": k} for k in range(3)],
}  # fmt: skip
WORDS = {
    "candidates": candidates(0.1, 0.4, text=EVIL),
    "chosen": 1,
    "trace": [
        {"event": "wording", "round": 0, "critique": "too dark", "note": ""},
        {"event": "wording", "round": 1, "critique": "", "note": "worded as before"},
    ],
}
CLIMB = {
    "candidates": candidates(0.6),
    "chosen": 0,
    "trace": [{"event": "step", "iteration": i, "value": 0.1 * i} for i in range(6)],
}
PLAIN = {"candidates": candidates(0.3, None, 0.6), "chosen": 2, "trace": []}


def way(tree):
    """Places of the chosen one's line, from the root."""
    found, at = [], tree.chosen
    while at is not None:
        found.append(tree.nodes[at].place)
        at = tree.nodes[at].parent
    return found[::-1]


@pytest.mark.parametrize(
    ("record", "columns", "chosen"),
    [
        (PARTICLES, [3, 3, 3], [1, 1, 1]),
        (FORKS, [4, 4, 2], [1, 2, 0]),  # the second of the first fork's survivors
        (PICKS, [4, 4, 2], [1, 1, 0]),
        (WALK, [1, 2, 2], [0, 1]),
    ],
    ids=["particles", "forks", "picks", "walk"],
)
def test_trees_follow_the_record(record, columns, chosen):
    tree = family_tree(record)
    widths = [sum(n.column == c for n in tree.nodes) for c in range(len(tree.labels))]
    assert widths == columns and way(tree) == chosen
    assert tree.lineage() <= tree.alive()
    svg = draw(tree, ["data:image/png;base64,AA=="] * len(record["candidates"]))
    assert svg.count("<image ") == len(record["candidates"])
    assert svg.count('class="edge on"') == len(chosen) - 1
    assert svg.count("<path ") == sum(n.parent is not None for n in tree.nodes)


def test_a_particle_that_went_on_alone():
    hurried = {
        **PARTICLES,
        "candidates": candidates(0.9),
        "chosen": 0,
        "trace": [
            PARTICLES["trace"][0],
            {"event": "hurry", "step": 4, "kept": 2},
            {"event": "last", "step": 9, "values": [0.9], "effective_size": 1.0},
        ],
    }
    assert way(family_tree(hurried)) == [0, 0]  # place 2 had gone on from particle 0


def test_unscored_states_are_drawn_as_such():
    assert draw(family_tree(PARTICLES)).count('class="dot none"') == 1


@pytest.mark.parametrize("record", [WORDS, CLIMB, PLAIN], ids=["words", "climb", "plain"])
def test_other_methods_have_no_tree(record):
    assert family_tree(record) is None


@pytest.fixture
def run(tmp_path):
    """A folder with one prompt of every kind of method."""
    kinds = [PARTICLES, FORKS, PICKS, WALK, WORDS, CLIMB, PLAIN]
    lines = []
    for i, kind in enumerate(kinds):
        names = [f"{i}-{k}.png" for k in range(len(kind["candidates"]))]
        for name in (*names, f"{i}.png", f"u{i}.png"):
            Image.new("RGB", (64, 64), (30 * i, 200, 9 * len(name))).save(tmp_path / name)
        lines.append({
            "index": i, "prompt": EVIL if i == 1 else f"prompt {i}", "file": f"{i}.png",
            "unsteered_file": f"u{i}.png", "shown": names, "score": 0.5 + i / 10,
            "unsteered_score": None if i == 6 else 0.4, "nfe": 96.0, "seconds": 1.5,
            "held_out": {"judge": {"steered": 1.0, "unsteered": float(i % 2)}}, **kind,
        })  # fmt: skip
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(ln) + "\n" for ln in lines))
    summary = {
        "policy": "some/folder/shapes-flow", "method": "fk", "options": {"k": 4}, "budget": {},
        "reward": "shapes_partial@1", "held_out": {"judge": "judge@2"}, "nfe": 672, "seed": 0,
        "bare_nfe": 32, "reward_calls": 60, "seconds": 10.5, "environment": {"torch": "2"},
    }  # fmt: skip
    (tmp_path / "steer.json").write_text(json.dumps(summary))
    return tmp_path, lines


def test_the_page_is_whole_safe_and_self_contained(run):
    folder, lines = run
    text = steering_report(folder).read_text()
    page = Page(text)
    assert "script" not in page.tags and EVIL not in text
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href"):
            assert value.startswith("data:image/png;base64,")
    assert text.count('class="wide tree"') == 4 and "too dark" in text
    assert "96 network evaluations" in text and "3 × one plain picture" in text
    found = differences(lines)
    assert found[""].pairs == 6 and found["judge"].pairs == 7  # one prompt was unscored unsteered
    assert found["judge"].before == pytest.approx(3 / 7) and found["judge"].after == 1.0
    assert "Held out: judge 0.429 to 1." in text and "verdict unclear" in text


def test_without_held_out_rewards_the_page_says_so(run):
    folder, lines = run
    bare = [{**ln, "held_out": {}} for ln in lines]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(ln) + "\n" for ln in bare))
    assert "No held-out reward was given" in steering_report(folder).read_text()


def test_a_lost_picture_is_said_to_be_lost(run):
    folder, _ = run
    (folder / "0.png").unlink()
    (folder / "1.png").write_bytes(b"torn")
    assert steering_report(folder).read_text().count("not kept") == 2


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(FileNotFoundError):
        steering_report(tmp_path)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_every_picture(run, tmp_path):
    file = steering_report(run[0])
    with Chromium(tmp_path) as browser:
        page = browser.tab(1200, 2400)
        page.open(f"file://{file}")
        page.until("document.readyState === 'complete' && document.images.length")
        page.js("for (const d of document.querySelectorAll('details')) d.open = true")
        assert page.js("[...document.images].every(i => i.naturalWidth > 0)")
        assert page.js("document.images.length") == file.read_text().count("<img ")
        assert page.js("document.documentElement.scrollWidth <= innerWidth")
        assert not page.errors()
