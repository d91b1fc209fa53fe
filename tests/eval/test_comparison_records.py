"""Records of a comparison: tables out of an archive, without weights and pictures."""

from __future__ import annotations

import json
import lzma
import shutil
import tarfile
from pathlib import Path

import pytest

from eval.methods.judges import measured
from eval.methods.markdown import tables
from eval.methods.page import comparison_page
from eval.methods.read import FILE, read_comparison
from eval.methods.records import RecordsError, pack, unpack
from eval.methods.summary import Summary

RUNS = 9  # that ended, of the fixture: three methods of three seeds, and a run that failed


@pytest.fixture(scope="module")
def archive(folder, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("kept") / "records.tar.xz"
    assert pack(folder, path) == RUNS
    return path


def test_tables_come_out_of_an_archive_as_they_were(folder, archive, tmp_path):
    assert unpack(archive, tmp_path) == RUNS
    assert not list(tmp_path.rglob("*.png")) and archive.stat().st_size < 60_000
    shutil.copy(folder / FILE, tmp_path)  # written anew by the command
    there, here = (Summary(read_comparison(f)) for f in (folder, tmp_path))
    assert tables(here) == tables(there) and "Early" in tables(here)
    page = comparison_page(here, tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert "not kept" in page


def test_scores_of_judges_are_kept(folder, tmp_path):
    once = tmp_path / "once"
    shutil.copytree(folder, once)
    result = read_comparison(once).methods["early"].runs[0].results[0]
    scores = measured(result, "saturation")
    pack(once, tmp_path / "judged.tar.xz")
    unpack(tmp_path / "judged.tar.xz", tmp_path / "again")
    shutil.copy(folder / FILE, tmp_path / "again")
    bare = read_comparison(tmp_path / "again").methods["early"].runs[0].results[0]
    assert (measured(bare, "saturation") == scores).all()
    with pytest.raises(FileNotFoundError, match="kept no picture"):
        measured(bare, "grid_energy")


def test_the_same_runs_make_the_same_bytes(folder, archive, tmp_path):
    unpack(archive, tmp_path / "again")
    pack(tmp_path / "again", tmp_path / "second.tar.xz")
    assert (tmp_path / "second.tar.xz").read_bytes() == archive.read_bytes()


def test_a_run_that_is_there_stays(archive, tmp_path):
    own = tmp_path / "early/seed_1"
    own.mkdir(parents=True)
    (own / "config.yaml").write_text("mine: 1\n")
    assert unpack(archive, tmp_path) == RUNS - 1
    assert [p.name for p in own.iterdir()] == ["config.yaml"]


def test_runs_that_have_not_ended_are_left_out(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    ended = copy / "late/seed_2/run.json"
    ended.write_text(json.dumps({**json.loads(ended.read_text()), "finished": False}))
    (copy / "late/seed_1/run.json").unlink()
    shutil.rmtree(copy / "late/seed_0/eval/after")  # killed before its last evaluation
    assert pack(copy, tmp_path / "some.tar.xz") == RUNS - 3
    assert pack(tmp_path / "nowhere", tmp_path / "none.tar.xz") == 0
    assert not (tmp_path / "none.tar.xz").exists()


def test_other_archives_are_named(archive, tmp_path):
    whole = archive.read_bytes()
    for content in (whole[: len(whole) // 2], b"no archive", lzma.compress(b"no archive")):
        broken = tmp_path / "broken.tar.xz"
        broken.write_bytes(content)
        with pytest.raises(RecordsError, match=r"broken\.tar\.xz"):
            unpack(broken, tmp_path / "out")
    for name in ("../outside/run.json", "run.json"):
        with tarfile.open(tmp_path / "foreign.tar.xz", "w:xz") as tar:
            tar.add(__file__, name)
        with pytest.raises(RecordsError, match=name):
            unpack(tmp_path / "foreign.tar.xz", tmp_path / "out")
    assert not (tmp_path / "out").exists()
