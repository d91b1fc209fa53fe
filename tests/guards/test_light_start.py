"""Help and listings import nothing heavy and answer at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

HEAVY = (
    "torch", "numpy", "PIL", "scipy", "diffusers", "transformers", "accelerate", "peft", "rich",
)  # fmt: skip
PROBE = """
import json, sys
from mmalign.cli import main
try:
    main({argv!r})
except SystemExit:
    pass
print(json.dumps(sorted(set({heavy!r}) & set(sys.modules))))
"""


@pytest.mark.parametrize(
    "argv", [["--help"], ["--version"], ["train", "--help"], ["list"], ["list", "rewards"]], ids=str
)
def test_nothing_heavy_is_imported(argv, python):
    done = python("-c", PROBE.format(argv=argv, heavy=HEAVY))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_importing_the_package_is_free(python):
    code = f"import sys, mmalign; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert python("-c", code).stdout.strip() == "[]"


def test_help_takes_less_than_half_a_second(root):
    resource = pytest.importorskip("resource")

    def cpu_seconds() -> float:
        # Processor time, not the clock: a busy test machine must not fail a fast command.
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        env = {**os.environ, "PYTHONPATH": str(root)}
        command = [sys.executable, "-m", "mmalign", "--help"]
        subprocess.run(command, cwd=root, env=env, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    assert min(cpu_seconds() for _ in range(5)) < 0.5
