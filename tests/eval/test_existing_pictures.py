"""Pictures that are there already: judged in place, gaps named, resumed by digest."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

from eval.benchmarks.shapes import ShapesBenchmark
from eval.entry import evaluate, export_pictures, write_samples
from eval.evaluation_page import evaluation_report
from eval.harness import GapError, SettingsMismatchError, judge_folder, run_benchmark
from eval.layouts import LayoutError
from eval.result import EvalResult
from eval.trust import cautions
from mmalign.runtime.tables import TableFormatError

OPTIONS = {"prompts_per_task": 2, "samples_per_prompt": 2}


class Numbered(ShapesBenchmark):
    """The shapes benchmark with official numbers, as a benchmark with a folder layout has them."""

    layout = "unigenbench"

    def requests(self, limit=None):
        """Prompts numbered in order of their first request."""
        rows = super().requests(None)
        number = {p: str(i) for i, p in enumerate(dict.fromkeys((r.task, r.prompt) for r in rows))}
        return [replace(r, item=number[r.task, r.prompt]) for r in rows][:limit]


@pytest.fixture(scope="module")
def made(studio, tmp_path_factory) -> SimpleNamespace:
    """A finished evaluation, exported into the official layout."""
    base = tmp_path_factory.mktemp("made")
    benchmark = Numbered(**OPTIONS)
    result = run_benchmark(
        studio.Painter(), benchmark, base / "out", progress=False,
        generate=studio.Sketch(skill=0.6), batch_size=7,
    )  # fmt: skip
    count = export_pictures(result, benchmark, base / "official")
    return SimpleNamespace(result=result, benchmark=benchmark, base=base, count=count)


@pytest.fixture
def official(made, tmp_path):
    """A copy of the official folder that a test may damage."""
    folder = tmp_path / "official"
    folder.mkdir()
    for path in (made.base / "official").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def judge(made, folder, out=None, **options):
    """Judge a folder quietly."""
    return judge_folder(folder, made.benchmark, out, progress=False, **options)


def scores(result):
    """What must agree."""
    return [(r.key, r.value, r.valid, r.partial) for r in result.rows]


def test_judged_as_when_they_were_made(made, tmp_path):
    assert made.count == 24
    folder = made.base / "official"
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    found = judge(made, folder, tmp_path / "out", batch_size=5)
    assert scores(found) == scores(made.result) and found.accuracy == made.result.accuracy
    assert found.nfe == 0 and found.policy == "official" and not found.problems
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert not (tmp_path / "out" / "images").exists()  # in place, not copied
    loaded = EvalResult.load(tmp_path / "out" / "result.json")
    assert loaded == found
    assert all(loaded.image_path(r).samefile(folder / r.image.split("/")[-1]) for r in found.rows)


def test_gaps_are_named_and_the_rest_is_kept(made, official, tmp_path):
    (official / "3_0.png").unlink()
    (official / "4_0.png").write_bytes((official / "4_0.png").read_bytes()[:-60])
    Image.new("RGB", (64, 64)).save(official / "99_0.png")
    found = judge(made, official, tmp_path / "out")
    lost = [r for r in found.rows if not r.valid]
    assert len(found.rows) == 24 and found.overall.unscored == 2 == len(lost)
    notes = sorted(r.note for r in lost)
    assert "missing in" in notes[1] and "4_0.png" in notes[0]
    assert "1 pictures are of no request" in found.problems[0] and "99_0" in found.problems[0]
    said = " ".join(cautions(found))
    assert "2 pictures are unscored" in said and "99_0.png" in said
    page = evaluation_report(found, tmp_path / "page.html").read_text()
    assert "missing in" in page and "99_0.png" in page and ">Median<" in page
    with pytest.raises(GapError, match=r"1 of 24 pictures of shapes are missing .* 'unigenbench'"):
        judge(made, official, strict=True)
    Image.new("RGB", (64, 64)).save(official / "3_0.png")
    with pytest.raises(GapError, match=r"unscored .*4_0.png.*; what there is lies in"):
        judge(made, official, tmp_path / "strict", strict=True)
    assert len(EvalResult.load(tmp_path / "strict" / "result.json").rows) == 24


def test_only_changed_pictures_are_judged_again(made, official, tmp_path):
    class Counting(Numbered):
        asked = 0

        def judge(self, media, requests):
            Counting.asked += len(requests)
            return super().judge(media, requests)

    counted = SimpleNamespace(benchmark=Counting(**OPTIONS))
    (official / "5_1.png").unlink()
    judge(counted, official, tmp_path / "out")
    assert Counting.asked == 23
    (official / "5_1.png").write_bytes((made.base / "official" / "5_1.png").read_bytes())
    (official / "2_0.png").write_bytes((official / "6_0.png").read_bytes())
    found = judge(counted, official, tmp_path / "out")
    assert Counting.asked == 25  # the new one and the one that changed
    assert found.overall.unscored == 0
    assert scores(found)[1:2] == scores(made.result)[1:2]


def test_a_limit_takes_a_part_of_a_whole_folder(made, tmp_path):
    found = judge(made, made.base / "official", tmp_path / "out", limit=6, strict=True)
    assert scores(found) == scores(made.result)[:6] and found.limited
    assert cautions(found) == ["Only 6 of the benchmark's 24 pictures."]


def test_values_of_another_scale_are_no_shares(made, tmp_path):
    class Scored(Numbered):
        def judge(self, media, requests):
            score = super().judge(media, requests)
            return replace(score, value=20 + 3 * score.value)

    benchmark = Scored(**OPTIONS)
    found = judge_folder(made.base / "official", benchmark, tmp_path / "out", progress=False)
    assert found.unit == "score" and made.result.unit == "share"
    assert found.accuracy.mean == pytest.approx(20 + 3 * made.result.accuracy.mean)
    page = evaluation_report(found, tmp_path / "page.html").read_text()
    assert "Mean score 2" in page and "unscored as wrong" not in page


def test_sizes_may_differ(made, official):
    """A batch is judged size by size, each picture as it is."""
    path = official / "0_0.png"
    with Image.open(path) as image:
        image.resize((96, 96), Image.Resampling.NEAREST).save(path)
    found = judge(made, official, batch_size=24)
    same = [a == b for a, b in zip(scores(found), scores(made.result), strict=True)]
    assert sum(same) >= 23


def test_other_pictures_or_layouts_do_not_mix(made, official, tmp_path):
    judge(made, made.base / "official", tmp_path / "out")
    with pytest.raises(SettingsMismatchError, match="images"):
        judge(made, official, tmp_path / "out")
    with pytest.raises(LayoutError, match="holds no picture"):
        judge(made, tmp_path / "out")


def test_grids_are_cut_and_their_change_is_seen(made, tmp_path):
    benchmark = Numbered(prompts_per_task=1, samples_per_prompt=4)
    rows = benchmark.requests()
    colours = {r.key: (10 * n, 99, 0) for n, r in enumerate(rows)}
    for r in rows:
        Image.new("RGB", (64, 64), colours[r.key]).save(tmp_path / f"{r.key}.png")
    files = {r.key: tmp_path / f"{r.key}.png" for r in rows}
    from eval.layouts import layout_of

    layout_of("dpg").write(tmp_path / "grids", rows, files)
    found = judge_folder(tmp_path / "grids", benchmark, tmp_path / "out", layout="dpg",
                         progress=False)  # fmt: skip
    for row in found.rows:
        with Image.open(found.image_path(row)) as cell:
            assert cell.size == (64, 64) and cell.getpixel((5, 5)) == colours[row.key]
    Image.new("RGB", (128, 128)).save(tmp_path / "grids" / "0.png")
    with pytest.raises(SettingsMismatchError, match="grids"):
        judge_folder(tmp_path / "grids", benchmark, tmp_path / "out", layout="dpg", progress=False)


def test_tables_of_samples(made, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    write_samples(made.result, tmp_path / "a.parquet")
    rows = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert [(r["key"], r["value"], r["valid"]) for r in rows] == [
        s[:3] for s in scores(made.result)
    ]
    assert int(rows[0]["seed"]) == made.result.rows[0].seed  # 63 bits survive
    write_samples(made.result, tmp_path / "a.csv")
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 25


def test_options_that_do_not_go_together(made, tmp_path):
    folder = made.base / "official"
    with pytest.raises(ValueError, match="a policy to generate with, or images"):
        evaluate("shapes-flow", made.benchmark, images=folder)
    with pytest.raises(ValueError, match="steps belong to generating"):
        evaluate(None, made.benchmark, images=folder, steps=3)
    with pytest.raises(ValueError, match="export copies pictures that were generated"):
        evaluate("shapes-flow", made.benchmark, export=tmp_path / "x")
    with pytest.raises(TableFormatError, match="names no table format"):
        evaluate("shapes-flow", made.benchmark, table=tmp_path / "x.txt")
    with pytest.raises(ValueError, match="layout says how"):
        evaluate("shapes-flow", made.benchmark, layout="flat")
