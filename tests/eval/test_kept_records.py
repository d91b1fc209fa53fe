"""Tables of the documentation are those of the records beside it, and of today's recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.methods.markdown import BEGIN, END, tables
from eval.methods.read import read_comparison
from eval.methods.records import unpack
from eval.methods.summary import Summary
from trainers.comparison.alarms import alarms
from trainers.comparison.runner import run_all
from trainers.comparison.table import PANEL, read_table

DOCS = Path(__file__).resolve().parents[2] / "docs"
ARCHIVES = {p.name.removesuffix(".tar.xz"): p for p in (DOCS / "records").glob("*.tar.xz")}


@pytest.mark.parametrize("name", sorted(ARCHIVES.keys() - {"panel"}))
def test_a_table_is_that_of_its_records(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # settings of rows hold the path of what they start from
    out = Path("runs") / name
    kept = unpack(ARCHIVES[name], out)
    record = run_all(read_table(name), out, jobs=0)
    assert sum(r["state"] == "finished" for r in record["runs"]) == kept
    page = (DOCS / "methods-comparison.md").read_text(encoding="utf-8")
    begin, end = (mark.replace("results", f"results {name}") for mark in (BEGIN, END))
    shown = page.split(begin)[1].split(end)[0].strip()
    assert tables(Summary(read_comparison(out))).strip() == shown


def test_counts_of_flags_are_those_of_the_records(tmp_path):
    assert unpack(ARCHIVES["panel"], tmp_path) == 20
    found = alarms(run_all(read_table(PANEL), tmp_path, jobs=0), tmp_path)
    page = (DOCS / "safeguards.md").read_text(encoding="utf-8")
    assert [one.runs for one in found] == [10, 10]
    for one in found:
        assert f"| {' | '.join(one.cells())} |" in page
