"""What benchmarks print, against numbers computed by hand from the official definitions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from eval.benchmarks.base import DataError
from eval.benchmarks.dpg import DPGBench, cascade
from eval.benchmarks.geneval import GenEvalBenchmark
from eval.benchmarks.hpsv2 import CHUNK, HPSv2Benchmark
from eval.benchmarks.load import load_benchmark
from eval.benchmarks.prompt_sets import DrawBench, GenAIBenchPrompts, OcrBenchmark, PartiPrompts
from eval.benchmarks.unigenbench import UniGenBench
from eval.benchmarks.wise import Wise, domain_of
from mmalign.registry import BENCHMARKS, UnknownNameError

# --- what all share -----------------------------------------------------------------------------


def lines(path: Path, *texts: str) -> Path:
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def test_missing_files_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMALIGN_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"--data.*mmalign data get geneval"):
        GenEvalBenchmark()
    with pytest.raises(DataError, match="nowhere does not exist"):
        GenEvalBenchmark(tmp_path / "nowhere")
    (tmp_path / "drawbench").mkdir()
    lines(tmp_path / "drawbench" / "test.txt", "a cat")
    (tmp_path / "drawbench" / "files.json").write_text("{}")
    assert [r.prompt for r in DrawBench().requests()] == ["a cat"]


def test_options_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="'fixed'"):
        DrawBench(tmp_path, mode="fixd")
    with pytest.raises(ValueError, match="1 or more"):
        DrawBench(tmp_path, samples_per_prompt=0)
    with pytest.raises(UnknownNameError, match="variant"):
        load_benchmark("wise", data=tmp_path, varaint="legacy")
    assert load_benchmark("wise", data=tmp_path, mode="fixed", variant="verified").mode == "fixed"
    with pytest.raises(ValueError, match="data belong to the benchmark object"):
        load_benchmark(DrawBench(tmp_path), data=tmp_path)


def test_every_registered_benchmark_loads() -> None:
    for entry in BENCHMARKS:
        assert BENCHMARKS.load(entry.name).name == entry.name


def test_requests_take_tasks_in_turn_and_do_not_depend_on_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "drawbench.csv"
    lines(path, "Prompts,Category", "a,x", "b,x", "c,y")
    made = DrawBench(path, samples_per_prompt=2).requests()
    assert [(r.prompt, r.sample) for r in made] == [
        ("a", 0), ("a", 1), ("c", 0), ("c", 1), ("b", 0), ("b", 1)]  # fmt: skip
    assert DrawBench(path, samples_per_prompt=2).requests(3) == made[:3]
    assert len({r.seed for r in made}) == 6 and len({r.key for r in made}) == 6
    assert DrawBench(path, samples_per_prompt=1).requests()[1].seed == made[2].seed


def test_broken_rows_are_named_and_the_others_used(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "evaluation_metadata.jsonl",
        '{"tag": "colors", "prompt": "a photo of a red cup", '
        '"include": [{"class": "cup", "count": 1, "color": "red"}]}',
        "{broken",
        '{"tag": "colour", "prompt": "x", "include": []}',
        '{"tag": "colors", "prompt": "x", "include": [{"class": "cup", "count": 0}]}',
    )
    loaded = GenEvalBenchmark(path).load()
    assert [p.id for p in loaded.prompts] == ["00000"]
    assert [p.split(":")[0] for p in loaded.problems] == [
        f"{path.name}, line {n}" for n in (2, 3, 4)]  # fmt: skip
    assert "not JSON" in loaded.problems[0] and "'colour'" in loaded.problems[1]
    lines(path, "{broken")
    with pytest.raises(DataError, match="no usable prompt"):
        GenEvalBenchmark(path).load()


# --- GenEval ------------------------------------------------------------------------------------


def geneval(folder: Path, *tags: str) -> GenEvalBenchmark:
    clause = {"include": [{"class": "cup", "count": 1}]}
    said = [json.dumps({"tag": t, "prompt": f"{k}", **clause}) for k, t in enumerate(tags)]
    return GenEvalBenchmark(lines(folder / "evaluation_metadata.jsonl", *said),
                            samples_per_prompt=2)  # fmt: skip


def test_geneval_weighs_tasks_equally(tmp_path: Path, rows) -> None:
    benchmark = geneval(tmp_path, "colors", "colors", "counting")
    assert [r.item for r in benchmark.requests()[::2]] == ["00000", "00002", "00001"]
    # colors: 1 0 | 0 0, counting: 1 1
    found = benchmark.numbers(rows(benchmark, [1, 0, 1, 1, 0, 0]))
    assert found["colors"] == 0.25 and found["counting"] == 1.0
    assert found["overall"] == pytest.approx(0.625)
    assert found["correct images"] == pytest.approx(3 / 6)
    assert found["correct prompts"] == pytest.approx(2 / 3)


def test_geneval_unscored_pictures_are_no_zeros(tmp_path: Path, rows) -> None:
    benchmark = geneval(tmp_path, "colors")
    found = benchmark.numbers(rows(benchmark, [1, None]))
    assert found["overall"] == found["correct images"] == 1.0


def test_official_geneval_file(official) -> None:
    loaded = GenEvalBenchmark(official("geneval")).load()
    assert len(loaded.prompts) == 553 and not loaded.problems
    requests = GenEvalBenchmark(official("geneval")).requests()
    assert len(requests) == 553 * 4 and requests[0].metadata["tag"] == "single_object"


# --- DPG-Bench ----------------------------------------------------------------------------------

DPG_HEAD = "item_id,text,proposition_id,dependency,tuple,question_natural_language"


def dpg(folder: Path, *rows: str, **options) -> DPGBench:
    return DPGBench(lines(folder / "dpg_bench.csv", DPG_HEAD, *rows), **options)


def test_cascade_in_file_order_and_to_the_end() -> None:
    # 1 depends on 2, 2 on 3, 3 is answered no: the question before its parent keeps its yes.
    answers = {1: 1.0, 2: 1.0, 3: 0.0, 4: 1.0}
    parents = {1: [2], 2: [3], 3: [], 4: []}
    assert cascade(answers, parents, in_file_order=True) == {1: 1.0, 2: 0.0, 3: 0.0, 4: 1.0}
    assert cascade(answers, parents, in_file_order=False) == {1: 0.0, 2: 0.0, 3: 0.0, 4: 1.0}
    # In the order of the file it falls all the way down.
    assert cascade({1: 0.0, 2: 1.0, 3: 1.0}, {1: [], 2: [1], 3: [2]}, True) == {1: 0, 2: 0, 3: 0}


def test_dpg_numbers(tmp_path: Path, rows) -> None:
    table = (
        "a,first,1,0,entity - whole (x),x?",
        "b,second,1,0,entity - whole (cup),is there a cup?",
        "b,second,2,1,attribute - color (cup; red),is it red?",
    )
    fixed = dpg(tmp_path, *table, mode="fixed", samples_per_prompt=2)
    assert [p.id for p in fixed.load().prompts] == ["a", "b"]
    compat = dpg(tmp_path, *table, samples_per_prompt=2)
    assert [p.id for p in compat.load().prompts] == ["b"]  # the first data row is dropped
    parts = [{"q1": 1.0, "q2": 1.0}, {"q1": 0.0, "q2": 1.0}]
    found = compat.numbers(rows(compat, [1.0, 0.0], parts))
    # Categories: the last picture's answers before zeroing.
    assert found["DPG-Bench"] == 50.0
    assert found["entity"] == 0.0 and found["attribute"] == 100.0
    assert found["detail: attribute - color"] == 100.0
    parts = [{"q1": 1.0}, {"q1": 1.0}, *parts]
    found = fixed.numbers(rows(fixed, [1.0, 1.0, 1.0, 0.0], parts))
    assert found["DPG-Bench"] == 75.0
    assert found["entity"] == 75.0 and found["attribute"] == 50.0


def test_dpg_prompt_that_the_published_script_fails_on_is_left_out(tmp_path: Path) -> None:
    table = ("a,first,1,0,entity - whole (x),x?", "a,first,2,1,attribute - color (x),y?",
             "b,second,1,0,entity - whole (z),z?")  # fmt: skip
    loaded = dpg(tmp_path, *table).load()
    assert [p.id for p in loaded.prompts] == ["b"]
    assert "question 2 depends on 1" in loaded.problems[0]
    assert [p.id for p in dpg(tmp_path, *table, mode="fixed").load().prompts] == ["a", "b"]


def test_dpg_missing_column_is_named(tmp_path: Path) -> None:
    path = lines(tmp_path / "dpg_bench.csv", "item_id,text", "a,b")
    with pytest.raises(DataError, match="no column 'proposition_id'"):
        DPGBench(path).load()


# --- UniGenBench --------------------------------------------------------------------------------


def test_unigenbench_numbers(tmp_path: Path, rows) -> None:
    record = {
        "Primary Categories": "Art",
        "Testpoints": ["Style", "Action - Hand", "Action - State"],
        "Testpoint Description": ["ink", "waving", "asleep"],
    }
    cell = json.dumps(record).replace('"', '""')
    path = lines(tmp_path / "test_prompts_en.csv", "index,prompt_en,sub_dims_en",
                 f'0,one,"{cell}"', '1,two,"{""Testpoints"": [""Style""]}"')  # fmt: skip
    benchmark = UniGenBench(path, samples_per_prompt=3)
    assert "no lists" in benchmark.load().problems[0]
    parts = [{"point_0": 1.0, "point_1": 0.0, "point_2": 1.0},
             {"point_0": 0.0, "point_1": 0.0, "point_2": 1.0}, {}]  # fmt: skip
    found = benchmark.numbers(rows(benchmark, [2 / 3, 1 / 3, None], parts))
    assert found["point: Style"] == 0.5 and found["point: Action - Hand"] == 0.0
    assert found["Action"] == 0.5 and found["Style"] == 0.5
    assert found["micro"] == pytest.approx(3 / 6) and found["macro"] == 0.5
    rubric = benchmark.context(benchmark.load().prompts[0])["rubric"]
    assert [c.description for c in rubric.criteria][1] == "Action - Hand: waving"


def test_official_unigenbench_file(official) -> None:
    loaded = UniGenBench(official("unigenbench")).load()
    points = [name for p in loaded.prompts for name, _ in p.facts["points"]]
    assert len(loaded.prompts) == 600 and not loaded.problems
    assert len(points) == 1813 and len(set(points)) == 27
    assert len({name.split("-", 1)[0].strip() for name in points}) == 10


# --- HPSv2 --------------------------------------------------------------------------------------


def test_hpsv2_means_of_chunks(tmp_path: Path, rows) -> None:
    (tmp_path / "anime.json").write_text(json.dumps([f"p{k}" for k in range(CHUNK + 1)]))
    (tmp_path / "photo.json").write_text(json.dumps(["q", 7]))
    benchmark = HPSv2Benchmark(tmp_path)
    assert "photo.json, entry 1" in benchmark.load().problems[0]
    order = [r.task for r in benchmark.requests()]
    assert order[:3] == ["anime", "photo", "anime"]
    # anime: 80 times 0.2, then 0.4 alone in its chunk; photo: 0.3.
    values = [0.2, 0.3, *[0.2] * (CHUNK - 1), 0.4]
    found = benchmark.numbers(rows(benchmark, values))
    assert found["anime"] == pytest.approx(30.0)
    assert found["anime, deviation of chunks"] == pytest.approx(10.0)
    assert found["average"] == pytest.approx(100 * sum(values) / len(values))
    fixed = HPSv2Benchmark(tmp_path, mode="fixed")
    assert fixed.numbers(rows(fixed, values))["anime"] == pytest.approx(100 * 16.4 / 81)
    assert fixed.requests()[2].item == "1"


# --- WISE ---------------------------------------------------------------------------------------


def test_wise_domains_and_weights(tmp_path: Path, rows) -> None:
    assert [domain_of(n) for n in (1, 400, 401, 567, 568, 700, 701, 801, 1000)] == [
        "culture", "culture", "time", "time", "space", "space", "biology", "physics",
        "chemistry"]  # fmt: skip
    ids = (1, 401, 568, 701, 801, 901)
    records = [{"Prompt": f"p{n}", "Explanation": "e", "prompt_id": n} for n in ids]
    path = tmp_path / "natural_science.json"
    path.write_text(json.dumps([*records, {"Prompt": "x", "prompt_id": 0}]))
    benchmark = Wise(tmp_path)
    assert "1 to 1000, got 0" in benchmark.load().problems[0]
    values = [1.0, 0.5, 0.25, 0.2, 0.4, 0.6]
    found = benchmark.numbers(rows(benchmark, values))
    assert found["overall"] == pytest.approx(
        0.4 + 0.167 * 0.5 + 0.133 * 0.25 + 0.1 * (0.2 + 0.4 + 0.6)
    )
    verified = Wise(tmp_path, variant="verified")
    found = verified.numbers(rows(verified, values))
    assert found["overall"] == pytest.approx(0.4 + 0.12 * (0.5 + 0.25 + 0.2 + 0.4 + 0.6))
    missing = benchmark.numbers(rows(benchmark, [*values[:5], None]))
    assert missing["overall"] is None and missing["culture"] == 1.0
    assert benchmark.options["variant"] != verified.options["variant"]


# --- prompt sets --------------------------------------------------------------------------------


def test_parti_categories_and_challenges(tmp_path: Path, rows) -> None:
    path = lines(
        tmp_path / "PartiPrompts.tsv",
        "Prompt\tCategory\tChallenge\tNote",
        'a "cat\tAnimals\tBasic\t',
        "b\tAnimals\tImagination\tn",
        "\tArts\tBasic\t",
    )
    benchmark = PartiPrompts(path)
    assert [p.text for p in benchmark.load().prompts] == ['a "cat', "b"]
    assert "line 4: column 'Prompt' is empty" in benchmark.load().problems[0]
    found = benchmark.numbers(rows(benchmark, [1.0, 3.0]))
    assert found == {"overall": 2.0, "Animals": 2.0, "challenge: Basic": 1.0,
                     "challenge: Imagination": 3.0}  # fmt: skip


def test_official_parti_file(official) -> None:
    loaded = PartiPrompts(official("parti")).load()
    assert len(loaded.prompts) == 1632 and not loaded.problems
    assert sum(p.task == "Animals" for p in loaded.prompts) == 314


def test_ocr_prompts_must_quote_something(tmp_path: Path, rows, official) -> None:
    path = lines(tmp_path / "test.txt", 'a sign "open"', "a sign", 'a sign " "')
    benchmark = OcrBenchmark(path)
    assert [p.id for p in benchmark.load().prompts] == ["00000"]
    assert len(benchmark.load().problems) == 2
    assert benchmark.numbers(rows(benchmark, [0.75], [{"exact": 0.0}])) == {
        "overall": 0.75, "exact": 0.0}  # fmt: skip
    assert len(OcrBenchmark(official("ocr")).load().prompts) == 300


def test_genai_skills_overlap(tmp_path: Path, rows) -> None:
    records = {"00000": {"prompt": "a"}, "00001": {"prompt": "b"}, "00002": {}}
    (tmp_path / "genai_image.json").write_text(json.dumps(records))
    skills = {"counting": ["00000", "00001"], "negation": ["00001"]}
    (tmp_path / "genai_skills.json").write_text(json.dumps(skills))
    benchmark = GenAIBenchPrompts(tmp_path)
    assert "id '00002'" in benchmark.load().problems[0]
    found = benchmark.numbers(rows(benchmark, [0.2, 0.6]))
    assert found["overall"] == pytest.approx(0.4) and found["counting"] == pytest.approx(0.4)
    assert found["negation"] == 0.6


def test_numbers_of_nothing_are_none(tmp_path: Path, rows) -> None:
    benchmark = DrawBench(lines(tmp_path / "test.txt", "a"))
    assert benchmark.numbers(rows(benchmark, [None])) == {"overall": None}
    assert not math.isnan(benchmark.requests()[0].seed)
