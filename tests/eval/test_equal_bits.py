"""Same command, same pictures: bit for bit in any batch size and number of processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mmalign
from eval.bench import bench_evaluation
from eval.harness import CPU_PIN, run_benchmark
from eval.result import EvalResult
from eval.workers import Workers
from mmalign import cli
from mmalign.policies.load import load_policy
from mmalign.runtime.log import read_jsonl

COMMAND = ["evaluate", "--policy", "shapes-flow", "--limit", "11", "--steps", "2", "--quiet"]


def pictures(folder: Path) -> dict[str, bytes]:
    """The files of a result by name."""
    return {p.name: p.read_bytes() for p in (folder / "images").iterdir()}


def scores(folder: Path) -> list[tuple]:
    """Keys and verdicts, in order."""
    rows = EvalResult.load(folder / "result.json").rows
    return [(r.key, r.value, r.valid, r.partial) for r in rows]


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> SimpleNamespace:
    """The same command: alone in one batch size, and by two processes in another."""
    torch.set_num_threads(1)
    base = tmp_path_factory.mktemp("bits")
    root = str(Path(mmalign.__file__).resolve().parents[1])
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    # Without --multi_gpu accelerate starts one process only; --device cpu makes it a gloo group.
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu",
              "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no", "--main_process_port", str(free_port()), "-m",
              "mmalign"]  # fmt: skip
    options = ["--device", "cpu", "--batch-size", "3", "--out", str(base / "two")]
    options += ["--table", str(base / "two.csv")]
    done = subprocess.run([sys.executable, *launch, *COMMAND, *options], env=env, text=True,
                          capture_output=True, timeout=240)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    alone = ["--batch-size", "16", "--device", "cpu", "--out", str(base / "one")]
    assert cli.main([*COMMAND, *alone]) == 0
    return SimpleNamespace(base=base, said=done.stdout)


def test_two_processes_make_the_pictures_of_one(made):
    one, two = pictures(made.base / "one"), pictures(made.base / "two")
    assert len(one) == 11 and one == two
    assert scores(made.base / "one") == scores(made.base / "two")
    alone, shared = (EvalResult.load(made.base / n / "result.json") for n in ("one", "two"))
    assert (alone.provenance["processes"], shared.provenance["processes"]) == (1, 2)
    assert alone.nfe == shared.nfe and alone.settings == shared.settings
    assert alone.settings["pin"] == CPU_PIN
    assert made.said.count("mean over tasks") == 1  # only the first process speaks
    assert len((made.base / "two.csv").read_text().splitlines()) == 12


def test_two_processes_leave_one_file_of_lines(made):
    folder = made.base / "two"
    assert sorted(p.name for p in folder.glob("samples*")) == ["samples.jsonl"]
    keys = [r["key"] for r in read_jsonl(folder / "samples.jsonl")]
    assert sorted(keys) == sorted(k for k, *_ in scores(folder))
    assert (folder / "report.html").is_file()


def test_a_run_of_two_processes_is_continued_by_one(made, tmp_path):
    """What a kill leaves of two processes: a file of lines each, one of them torn."""
    lines = (made.base / "two" / "samples.jsonl").read_text().splitlines(keepends=True)
    out = tmp_path / "out"
    (out / "images").mkdir(parents=True)
    for name, data in pictures(made.base / "two").items():
        (out / "images" / name).write_bytes(data)
    (out / "settings.json").write_text((made.base / "two" / "settings.json").read_text())
    (out / "samples-0.jsonl").write_text("".join(lines[:4]))
    (out / "samples-1.jsonl").write_text("".join(lines[4:8]) + lines[8][:50])
    before = {p.name: p.stat().st_mtime_ns for p in (out / "images").iterdir()}
    assert cli.main([*COMMAND, "--device", "cpu", "--out", str(out)]) == 0
    again = [p.name for p in (out / "images").iterdir() if p.stat().st_mtime_ns != before[p.name]]
    assert sorted(again) == sorted(f"{json.loads(ln)['key']}.png" for ln in lines[8:])
    assert pictures(out) == pictures(made.base / "one")


def test_work_is_shared_by_prompt():
    from eval.benchmarks.shapes import ShapesBenchmark

    requests = ShapesBenchmark(prompts_per_task=3, samples_per_prompt=2).requests()
    shares = [Workers(rank, 4).share(requests) for rank in range(4)]
    assert sorted(r.key for s in shares for r in s) == sorted(r.key for r in requests)
    owners = [{r.prompt for r in s} for s in shares]
    assert all(not a & b for i, a in enumerate(owners) for b in owners[i + 1 :])
    assert max(map(len, owners)) - min(map(len, owners)) <= 1


def test_pinned_calls_are_all_of_one_size(studio, tmp_path):
    from eval.benchmarks.shapes import ShapesBenchmark

    class Sized(studio.Sketch):
        def __call__(self, policy, prompts, seeds, **options):
            sizes.append(len(prompts))
            return super().__call__(policy, prompts, seeds, **options)

    sizes: list[int] = []
    benchmark = ShapesBenchmark(prompts_per_task=3, samples_per_prompt=1)
    pinned = run_benchmark(studio.Painter(), benchmark, generate=Sized(), progress=False,
                           batch_size=6, pin=4)  # fmt: skip
    assert sizes == [4, 4, 4, 4, 4] and len(pinned.rows) == 18
    assert pinned.nfe == 18 * 10  # repeats that fill a call up are nobody's
    with pytest.raises(ValueError, match="pin: 0"):
        run_benchmark(studio.Painter(), benchmark, pin=0)


def test_without_a_pin_rounding_may_show():
    """Where exactness ends: the network's own batch size."""
    policy = load_policy("shapes-flow")
    from eval.benchmarks.shapes import ShapesBenchmark
    from mmalign.sampling import generate

    requests = ShapesBenchmark().requests(CPU_PIN)
    asked = [r.prompt for r in requests], [r.seed for r in requests]
    whole = generate(policy, *asked, steps=2)[0].data
    alone = generate(policy, asked[0][:1], asked[1][:1], steps=2)[0].data
    torch.testing.assert_close(alone[0], whole[0], rtol=0, atol=1e-4)
    # In calls of one size a row does not depend on its place or on the others.
    turned = generate(policy, asked[0][::-1], asked[1][::-1], steps=2)[0].data
    assert turned.flip(0).equal(whole)


def test_end_to_end_rate(studio):
    found = bench_evaluation("shapes-flow", images=4, batch_size=2, steps=1, repeats=2,
                             device="cpu")  # fmt: skip
    rate = found["images_per_second"]
    assert 0 < rate["min"] <= rate["median"] <= rate["max"]
    assert 0 < found["generating"] <= 1 and found["settings"]["images"] == 4
