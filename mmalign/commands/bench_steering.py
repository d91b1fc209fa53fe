"""``mmalign bench steering``: steering methods against compute, claims decided by intervals."""

from __future__ import annotations

from argparse import Namespace
from functools import partial

from mmalign.commands.bench_methods import compare, names, numbers, refuse
from mmalign.commands.common import CommandError

OUT = "runs/steering"
_FOREIGN = (
    "policy", "device", "dtype", "batch_size", "batch_sizes", "images", "steps", "guidance_scale",
    "size", "repeats", "adapter", "lora_rank", "kl_beta", "attention", "gradient_checkpointing",
    "compile", "objectives", "gradient_steps", "teacher",
    "evaluations", "nfe",
)  # fmt: skip


def run(args: Namespace) -> int:
    """Run what is missing, write the page, print the tables; 1 where a run failed."""
    from eval.methods.claims import read_claims
    from eval.steering.runner import run_all
    from eval.steering.table import SHIPPED, choose, read_table

    refuse(args, _FOREIGN, "steering")
    rewards = args.reward or [""]
    if len(rewards) > 1:
        raise CommandError(f"--reward {' '.join(rewards)}: one reward steers; name one")
    chosen = choose(
        read_table(args.table or SHIPPED), names(args.methods), numbers(args.seeds), rewards[0],
        args.tuned or "", args.short,
    )  # fmt: skip
    read_claims(chosen.claims)  # a broken claim is better found now than after hours
    return compare(args, OUT, partial(run_all, chosen))
