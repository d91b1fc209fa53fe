"""Orders, sides, repeats; tasks from files and folders."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from vision_rewards.labelling.gallery import Gallery, readable_pairs
from vision_rewards.labelling.order import OrderError, turns
from vision_rewards.labelling.tasks import Pair, Sample, TaskError, pairs_of_samples, read_tasks

MANY = [Pair(f"prompt {i}", f"{i}a.png", f"{i}b.png") for i in range(400)]


def test_everybody_has_an_order_of_their_own_that_a_seed_repeats():
    ann, bob = (turns(MANY, user, repeat=0) for user in ("ann", "bob"))
    assert sorted(t.pair for t in ann) == sorted(t.pair for t in bob) == list(range(400))
    assert [t.pair for t in ann] != [t.pair for t in bob]
    assert turns(MANY, "ann", repeat=0) == ann
    assert [t.pair for t in turns(MANY, "ann", repeat=0, seed=1)] != [t.pair for t in ann]
    fewer = [t.pair for t in turns(MANY[:300], "ann", repeat=0)]
    assert fewer == [t.pair for t in ann if t.pair < 300]  # more tasks later reorder nothing


def test_sides_are_drawn_evenly_for_each_pair_and_person():
    ann, bob = ({t.pair: t.swapped for t in turns(MANY, u, repeat=0)} for u in ("ann", "bob"))
    # 200 expected with a deviation of 10; the draws are fixed, so this fails never or always.
    assert 160 < sum(ann.values()) < 240
    assert 160 < sum(ann[p] == bob[p] for p in ann) < 240
    assert not any(t.swapped for t in turns(MANY, "ann", swap=False))


def test_repeats_come_back_when_half_of_the_pairs_lies_between():
    for n, repeat, count in ((400, 0.1, 40), (399, 0.5, 200), (10, 0.1, 1), (2, 0.5, 1)):
        order = turns(MANY[:n], "ann", repeat=repeat)
        seen = Counter(t.pair for t in order)
        again = [t for t in order if t.round == 1]
        assert len(order) == n + count and len(again) == count == sum(seen[p] == 2 for p in seen)
        assert len({t.id for t in order}) == len(order)
        first = {t.pair: at for at, t in enumerate(order) if t.round == 0}
        for at, turn in enumerate(order):
            if turn.round == 1:
                assert at - first[turn.pair] >= n // 2
    with pytest.raises(OrderError, match=r"repeat is 0.6; it must lie in \[0, 0.5\]"):
        turns(MANY, "ann", repeat=0.6)


def write(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_tasks_of_a_file_keep_what_else_they_say(tmp_path):
    (tmp_path / "pictures").mkdir()
    row = {"prompt": "p", "image_a": "pictures/a.png", "image_b": "pictures/b.png"}
    other = {**row, "prompt": "q"}
    path = write(tmp_path / "tasks.jsonl", {**row, "label": "b", "model_a": "x"}, other, row)
    first, second = read_tasks(path, tmp_path / "out")
    assert (first.image_a, first.image_b) == ("../pictures/a.png", "../pictures/b.png")
    assert first.files(tmp_path / "out")[1] == tmp_path / "pictures" / "b.png"
    assert first.given == {"label": "b", "model_a": "x"} and second.prompt == "q"
    (moved,) = read_tasks(write(tmp_path / "t.jsonl", row), tmp_path, image_root=tmp_path / "x")
    assert moved.image_a == "x/pictures/a.png"
    exchanged = {**row, "image_a": row["image_b"], "image_b": row["image_a"]}
    assert len(read_tasks(write(tmp_path / "e.jsonl", row, exchanged), tmp_path)) == 1


def test_paths_survive_a_folder_of_labels_behind_a_link(tmp_path):
    (tmp_path / "far" / "labels").mkdir(parents=True)
    link = tmp_path / "labels"
    link.symlink_to(tmp_path / "far" / "labels", target_is_directory=True)
    path = write(tmp_path / "t.jsonl", {"prompt": "p", "image_a": "a.png", "image_b": "b.png"})
    (pair,) = read_tasks(path, link)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert (link / pair.image_a).is_file()  # as whoever reads the labels there will look for it
    assert pair.files(link.resolve())[0].is_file()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "image_a": "a.png"}, r"line 1: image_b is None; it must be the path"),
        ({"prompt": " ", "image_a": "a.png", "image_b": "b"}, r"line 1: prompt is ' '"),
        ({"prompt": "p", "image_a": "a.png", "image_b": "./a.png"}, "are one file, a.png"),
        ({"prompt": "p", "text": "x"}, "line 1: image is None"),
        ({"prompt": "p", "image": "a.png"}, "none of 1 prompts has two pictures"),
    ],
)
def test_tasks_that_cannot_be_shown_are_named(tmp_path, row, message):
    with pytest.raises(TaskError, match=message):
        read_tasks(write(tmp_path / "t.jsonl", row), tmp_path)


def test_samples_of_a_prompt_become_connected_pairs(tmp_path):
    samples = [Sample(p, tmp_path / f"{p}{i}.png") for p, k in (("x", 5), ("y", 2), ("z", 1))
               for i in range(k)]  # fmt: skip
    pairs = pairs_of_samples(samples, tmp_path)
    assert Counter(p.prompt for p in pairs) == {"x": 5, "y": 1}
    uses = Counter(name for p in pairs if p.prompt == "x" for name in (p.image_a, p.image_b))
    assert set(uses.values()) == {2} and len(uses) == 5
    every = pairs_of_samples(samples, tmp_path, every=True)
    assert Counter(p.prompt for p in every) == {"x": 10, "y": 1}
    assert {p.key for p in pairs} <= {p.key for p in every}
    assert pairs_of_samples(samples[::-1], tmp_path)[-5:] == pairs[:5]  # not the order of files


def test_pictures_that_cannot_be_read_are_named_or_left_out(tmp_path):
    for name in "abc":
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    Image.effect_noise((32, 32), 50).save(tmp_path / "bad.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "bad.png").read_bytes()[:400])
    good = Pair("p", "a.png", "b.png")
    pairs = [good, Pair("p", "c.png", "bad.png"), Pair("p", "a.png", "gone.png")]
    with pytest.raises(TaskError, match=r"2 of 5 pictures cannot be read") as error:
        readable_pairs(pairs, tmp_path)
    assert "bad.png" in str(error.value) and "gone.png: no such file" in str(error.value)
    kept, broken = readable_pairs(pairs, tmp_path, skip_broken=True)
    assert kept == [good] and len(broken) == 2
    with pytest.raises(TaskError, match="no pair is left"):
        readable_pairs(pairs[1:], tmp_path, skip_broken=True)


def test_browsers_get_what_reward_models_see(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("I;16", (4, 4), 65535).save(tmp_path / "deep.png")
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "plain.jpg")
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "plain.bmp")
    names = ("clear.png", "deep.png", "plain.jpg", "plain.bmp")
    gallery = Gallery(tmp_path / name for name in names)
    for number, white in ((0, True), (1, True), (3, False)):
        data, kind = gallery.read(number)
        (tmp_path / "sent.png").write_bytes(data)
        with Image.open(tmp_path / "sent.png") as image:
            assert (kind, image.format, image.mode) == ("image/png", "PNG", "RGB")
            assert image.getpixel((0, 0)) == ((255, 255, 255) if white else (0, 0, 255))
    assert gallery.read(2) == ((tmp_path / "plain.jpg").read_bytes(), "image/jpeg")
    with pytest.raises(LookupError, match="no picture 4; there are 4"):
        gallery.read(4)
