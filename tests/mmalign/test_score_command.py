"""Scoring folders: prompts by file, tables on disk, journals, a killed run that goes on."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

import mmalign
from mmalign.captions import captions
from mmalign.cli import main
from mmalign.commands import score as command
from mmalign.prompts import PromptFileError
from mmalign.runtime import tables
from mmalign.runtime.extras import MissingExtraError
from mmalign.runtime.tables import TableFormatError, check_table_path, write_table
from mmalign.scoring import JournalError

COUNT = 12


def fill(folder, count=COUNT):
    """Pictures ``0.png`` .. whose first pixel is ten times their number, in two sizes."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        image = Image.new("RGB", (4 + i % 2, 4), (10 * i,) * 3)
        image.putpixel((1, 1), (255, 0, 0))
        image.save(folder / f"{i}.png")
    return folder


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path / "pictures")


@pytest.fixture
def reward_file(tmp_path):
    """A reward that keeps a record of what it was asked, and takes its time if told to."""
    path = tmp_path / "slow.py"
    log = tmp_path / "asked.txt"
    path.write_text(
        "import os, time\n"
        "def level(images, prompts):\n"
        f"    with open({str(log)!r}, 'a') as file:\n"
        "        file.writelines(f'{i.getpixel((0, 0))[0] // 10}\\n' for i in images)\n"
        "    time.sleep(float(os.environ.get('SLOW', 0)) * len(images))\n"
        "    return [i.getpixel((0, 0))[0] / 10 for i in images]\n"
    )
    return path


def asked(reward_file):
    """Pictures the reward was asked about since the last call."""
    log = reward_file.with_name("asked.txt")
    rows = sorted(map(int, log.read_text().split())) if log.exists() else []
    log.unlink(missing_ok=True)
    return rows


# --- tables -------------------------------------------------------------------------------------

REWARD = "contrast + 0.5*jpeg_compressibility"


def read_table(path):
    if path.suffix == ".csv":
        rows = list(csv.DictReader(path.open(newline="")))
        return [{**r, "valid": r["valid"] == "true"} for r in rows]
    if path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        return parquet.read_table(path).to_pylist()
    return [{**r, **r["parts"]} for r in map(json.loads, path.read_text().splitlines())]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_folder_becomes_a_table(folder, tmp_path, suffix, capsys):
    (folder / "3.png").write_bytes(b"damaged")
    out = tmp_path / "made" / f"scores.{suffix}"
    argv = ["score", str(folder), "--reward", REWARD, "--out", str(out), "--batch-size", "5"]
    assert main(argv) == 0
    rows = read_table(out)
    expected = mmalign.score(folder, None, REWARD)
    assert [r["image"] for r in rows] == [str(folder / f"{i}.png") for i in range(COUNT)]
    assert [r["valid"] for r in rows] == expected.valid.tolist() == [i != 3 for i in range(COUNT)]
    assert rows[3]["value"] in (None, "") and "3.png: not a picture" in rows[3]["note"]
    for name in ("value", "contrast", "jpeg_compressibility"):
        want = expected.value if name == "value" else expected.parts[name]
        got = [float(r[name]) for i, r in enumerate(rows) if i != 3]
        assert got == pytest.approx(want[want.isfinite()].tolist(), rel=1e-6)
        assert len({round(v, 6) for v in got}) > 5 or name == "jpeg_compressibility"
    assert {r["reward"] for r in rows} == {expected.identity}
    assert os.listdir(out.parent) == [out.name]  # neither journal nor temporary file is left
    captured = capsys.readouterr()
    assert "over 11 of 12 pictures; 1 unscored" in captured.out
    assert "12/12" in captured.err and "/s" in captured.err


def test_parquet_knows_its_types_and_its_reward(folder, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "s.parquet"
    assert main(["score", str(folder), "--reward", REWARD, "--out", str(out), "--quiet"]) == 0
    schema = parquet.read_schema(out)
    assert [f"{f.name} {f.type}" for f in schema][:5] == [
        "image string", "prompt string", "value double", "valid bool", "note string",
    ]  # fmt: skip
    assert schema.metadata[b"reward"].decode() == mmalign.score(folder, None, REWARD).identity


def test_a_part_hides_no_column(folder, tmp_path):
    out = tmp_path / "s.csv"
    score = mmalign.score(folder, None, {"value": ("contrast", 1.0), "b": ("contrast", 2.0)})
    records = command._records(sorted(folder.iterdir()), None, score)
    command._write(out, records, score)
    row = read_table(out)[0]
    assert float(row["value"]) == pytest.approx(float(row["part_value"]) + 2 * float(row["b"]))


def test_many_pictures_are_summed_up(folder, capsys, monkeypatch):
    monkeypatch.setattr(command, "WHOLE_TABLE", 10)
    (folder / "0.png").write_bytes(b"")
    assert main(["score", str(folder), "--reward", "sharpness", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert all(word in printed.out for word in ("highest", "lowest", "unscored", "median"))
    assert printed.out.count(".png ") <= 3 * command.ENDS + 1 and not printed.err


def test_output_that_cannot_be_written_is_refused_first(folder, tmp_path, capsys, monkeypatch):
    argv = ["score", str(folder), "--reward", "no_such_reward", "--out"]
    assert main([*argv, str(tmp_path / "scores.xlsx")]) == 2
    assert "use .jsonl, .ndjson, .csv, .parquet" in capsys.readouterr().err
    (tmp_path / "old.csv").write_text("precious")
    assert main([*argv, str(tmp_path / "old.csv")]) == 2
    assert "give --overwrite" in capsys.readouterr().err
    assert (tmp_path / "old.csv").read_text() == "precious"
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mmalign\[parquet\]'"):
        check_table_path("scores.parquet")
    assert main(["score", "--reward", "sharpness"]) == 2
    assert "give pictures" in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_table(tmp_path, monkeypatch):
    path = tmp_path / "t.csv"
    write_table(path, [{"a": 1.0, "b": True}, {"a": None, "b": False}], {"a": float, "b": bool}, {})
    before = path.read_text()
    assert before.splitlines() == ["a,b", "1.0,true", ",false"]

    def broken(*args):
        args[0].write_text("half")
        raise RuntimeError("torn")

    monkeypatch.setattr(tables, "_write_csv", broken)
    with pytest.raises(RuntimeError, match="torn"):
        write_table(path, [], {"a": float}, {})
    assert path.read_text() == before and os.listdir(tmp_path) == ["t.csv"]
    with pytest.raises(TableFormatError):
        write_table(tmp_path / "t", [], {}, {})


# --- prompts ------------------------------------------------------------------------------------


def test_prompts_in_order_by_name_and_beside(folder, tmp_path):
    files = [folder / f"{i}.png" for i in range(3)]
    source = tmp_path / "p.txt"
    source.write_text("a\nb\nc\n")
    assert [p for p, _ in captions(files, source)] == ["a", "b", "c"]
    source.write_text("one for all\n")
    assert [p for p, _ in captions(files, source)] == ["one for all"] * 3
    for i, file in enumerate(files):
        file.with_suffix(".txt").write_text(f"prompt {i}\n")
    assert [p for p, _ in captions(files, folder)] == ["prompt 0", "prompt 1", "prompt 2"]
    with pytest.raises(PromptFileError, match=r"3\.png has no prompt: .*3\.txt"):
        captions([folder / "3.png"], folder)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_tables_name_pictures_in_any_order_with_facts(folder, tmp_path, suffix):
    source = tmp_path / f"p{suffix}"
    rows = [("pictures/2.png", "c", "z"), ("0.png", "a, b", "x"), (str(folder / "1.png"), "b", "y")]
    rows.append(("other.png", "unused", ""))
    if suffix == ".csv":
        with source.open("w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file).writerows([("file_name", "prompt", "text"), *rows])
    else:
        keys = ("image", "prompt", "text")
        source.write_text("".join(json.dumps(dict(zip(keys, r, strict=True))) + "\n" for r in rows))
    found = captions([folder / f"{i}.png" for i in range(3)], source)
    assert found == [("a, b", {"text": "x"}), ("b", {"text": "y"}), ("c", {"text": "z"})]
    with pytest.raises(
        PromptFileError, match=r"no prompt for 1 of 2 pictures, the first is .*3\.p"
    ):
        captions([folder / "0.png", folder / "3.png"], source)


def test_the_most_exact_name_wins(tmp_path):
    source = tmp_path / "p.jsonl"
    rows = [{"image": "1.png", "prompt": "any"}, {"image": "b/1.png", "prompt": "b"}]
    source.write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = captions([tmp_path / "a" / "1.png", tmp_path / "b" / "1.png"], source)
    assert [p for p, _ in found] == ["any", "b"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "image,prompt\n1.png,a\n1.png,b\n", "record 2 names '1.png' a second time"),
        ("p.csv", "image,prompt\n,a\n", "record 1 names no picture"),
        ("p.csv", "image,prompt\n1.png\n", "more or fewer cells"),
        ("p.csv", "image,prompt\n1.png,a,b\n", "more or fewer cells"),
        ("p.csv", "image,words\n1.png,a\n", "no text in 'prompt'"),
        ("p.csv", "image,prompt\n", "holds no prompt"),
        ("p.jsonl", '{"image": "1.png", "prompt": ""}\n', "no text in 'prompt'"),
        ("p.jsonl", '{"image": \n', "line 1: not JSON"),
        ("p.jsonl", "[1]\n", "line 1: expected an object"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b"}\n', "2 prompts for 1 pictures"),
        ("p.txt", "a\nb\n", "2 prompts for 1 pictures"),
    ],
)
def test_bad_prompt_files_are_explained(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(PromptFileError, match=message):
        captions([tmp_path / "1.png"], tmp_path / name)


def test_facts_reach_the_reward_and_the_table(folder, tmp_path):
    rewards = tmp_path / "facts.py"
    rewards.write_text(
        "def f(images, prompts, context):\n"
        "    return [len(p) + float(c['extra']) for p, c in zip(prompts, context)]\n"
    )
    source, out = tmp_path / "p.csv", tmp_path / "s.jsonl"
    lines = [f"{i}.png,{'x' * (i + 1)},{100 * i}" for i in range(COUNT)]
    source.write_text("\n".join(["image,prompt,extra", *reversed(lines)]))
    argv = ["score", str(folder), "--reward", f"{rewards}:f", "--prompts", str(source)]
    assert main([*argv, "--out", str(out), "--quiet"]) == 0
    assert [r["value"] for r in read_table(out)] == [101 * i + 1 for i in range(COUNT)]
    assert read_table(out)[2]["prompt"] == "xxx"


# --- journal ------------------------------------------------------------------------------------


def test_a_journal_spares_what_is_finished(folder, reward_file, tmp_path):
    reward, journal = f"{reward_file}:level", tmp_path / "j"
    (folder / "5.png").write_bytes(b"damaged")

    def run():
        return mmalign.score(folder, "p", reward, journal=journal, batch_size=4)

    first = run()
    assert asked(reward_file) == [i for i in range(COUNT) if i != 5]
    with journal.open("ab") as file:
        file.write(b'{"key": "torn')
    again = run()
    assert asked(reward_file) == []  # what was unscored is tried again, and is still damaged
    assert again.value[again.valid].equal(first.value[first.valid]) and again.notes[5]
    assert not again.valid[5] and again.identity == first.identity
    Image.new("RGB", (4, 4), (50,) * 3).save(folder / "5.png")
    os.utime(folder / "7.png", (1, 1))
    mended = run()
    assert asked(reward_file) == [5, 7] and mended.value.tolist() == list(range(COUNT))
    other_prompt = mmalign.score(folder, "q", reward, journal=journal)
    assert asked(reward_file) == list(range(COUNT)) and other_prompt.valid.all()


def test_parts_and_notes_survive_the_journal(folder, tmp_path):
    reward = {"contrast": 1.0, "jpeg_compressibility": 0.5}
    fresh = mmalign.score(folder, None, reward)
    for _ in range(2):
        kept = mmalign.score(folder, None, reward, journal=tmp_path / "j")
        assert kept.value.equal(fresh.value)
        assert {n: p.tolist() for n, p in kept.parts.items()} == {
            n: p.tolist() for n, p in fresh.parts.items()
        }


def test_a_journal_of_another_reward_is_refused(folder, reward_file, tmp_path, capsys):
    out = tmp_path / "s.csv"
    journal = command.journal_of(out)
    mmalign.score(folder, None, "contrast", journal=journal)
    with pytest.raises(JournalError, match=r"holds 12 scores of another reward, 'contrast@1'"):
        mmalign.score(folder, None, "sharpness", journal=journal)
    argv = ["score", str(folder), "--reward", "sharpness", "--out", str(out)]
    assert main(argv) == 2
    assert "--overwrite" in capsys.readouterr().err and not out.exists()
    assert main([*argv, "--overwrite"]) == 0
    assert float(read_table(out)[0]["value"]) > 100 and not journal.exists()
    (tmp_path / "notes").write_text('{"a": 1}\n')
    with pytest.raises(JournalError, match="no journal of scores"):
        mmalign.score(folder, None, "contrast", journal=tmp_path / "notes")
    (tmp_path / "notes").write_text('{"a": 1\n{}\n')
    with pytest.raises(JournalError, match="line 1: not JSON"):
        mmalign.score(folder, None, "contrast", journal=tmp_path / "notes")
    with pytest.raises(ValueError, match="give paths or a folder"):
        mmalign.score(torch.rand(1, 3, 4, 4), None, "contrast", journal=tmp_path / "k")


def test_a_killed_run_goes_on_where_it_was(tmp_path, reward_file, root):
    folder = fill(tmp_path / "pictures", 24)
    out = tmp_path / "scores.csv"
    argv = ["score", str(folder), "--reward", f"{reward_file}:level", "--prompt", "p"]
    argv += ["--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(root), "SLOW": "0.1"}
    command_line = [sys.executable, "-m", "mmalign", *argv, "--batch-size", "1"]
    process = subprocess.Popen(command_line, env=environment, stderr=subprocess.DEVNULL)
    journal, deadline = command.journal_of(out), time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if journal.exists() and journal.read_bytes().count(b"\n") > 5:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL and not out.exists()
    finished = journal.read_bytes().count(b"\n") - 1
    assert 5 <= finished < 24
    first = asked(reward_file)
    assert main([*argv, "--quiet"]) == 0
    second = asked(reward_file)
    # At most the batch that was under way is scored twice.
    assert len(second) == 24 - finished and len(first) - finished in (0, 1)
    assert sorted({*first, *second}) == list(range(24))
    assert [float(r["value"]) for r in read_table(out)] == [float(i) for i in range(24)]
    assert not journal.exists()
