"""The ``mmalign`` command: arguments only.

What the commands do is in ``mmalign.commands`` and is imported when a command runs, so that help
and listings answer at once. No heavy import may appear in this file.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from mmalign import __version__
from mmalign.commands.compare import add_arguments as _compare
from mmalign.commands.data import add_arguments as _data
from mmalign.commands.evaluate import add_arguments as _evaluate
from mmalign.commands.leaderboard import add_arguments as _leaderboard
from mmalign.commands.prefs import add_arguments as _prefs

# Errors defined in, or raised by, these packages were written for the user to read.
_OURS = ("mmalign", "vision_rewards", "trainers", "eval")
_KINDS = ("rewards", "policies", "objectives", "steerers", "benchmarks", "reward-benchmarks",
          "kernels", "recipes")  # fmt: skip

Parser = argparse.ArgumentParser


def _recipe(parser: Parser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or a shipped recipe's name")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings, as lr=1e-4")


def _train(parser: Parser) -> None:
    _recipe(parser)
    parser.add_argument("--output-dir", metavar="DIR", help="where the run is written")
    parser.add_argument("--no-preflight", action="store_true", help="skip the checks before it")
    parser.add_argument("--no-resume", action="store_true", help="never continue an earlier run")
    parser.add_argument("--no-report", action="store_true", help="write no HTML report at the end")
    parser.add_argument("--show", action="store_true", help="print the resolved recipe and stop")


def _prompts(parser: Parser, required: bool) -> None:
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument("--prompt", metavar="TEXT", help="one prompt for all")
    group.add_argument("--prompts", metavar="FILE", help=".txt, one a line, or .jsonl")


def _reward(parser: Parser) -> None:
    text = "a reward, or several with weights: a,b=0.5 (see: mmalign list rewards)"
    parser.add_argument("--reward", required=True, metavar="NAME[=WEIGHT],...", help=text)


def _steer(parser: Parser) -> None:
    parser.add_argument("--policy", required=True, metavar="NAME_OR_PATH", help="the generator")
    parser.add_argument("--lora", metavar="PATH", help="a LoRA adapter to load into it")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--prompt", metavar="TEXT", help="one prompt")
    group.add_argument("--prompts", metavar="FILE", help=".txt, one a line, or .jsonl")
    group.add_argument("--benchmark", metavar="NAME", help="prompts of a benchmark, and its judge")
    parser.add_argument("--limit", type=int, help="only so many prompts")
    _reward(parser)
    text = "a reward that only looks at the results, steered and not; may be given again"
    parser.add_argument("--held-out", action="append", default=[], metavar="NAME", help=text)
    parser.add_argument("--method", default="best_of_n", help="see: mmalign list steerers")
    parser.add_argument(
        "-o", "--option", action="append", default=[], metavar="k=v", help="method option, as n=8"
    )
    text = "limits for each prompt: nfe=400,seconds=30 (also reward_calls, decodes, memory=8gb)"
    parser.add_argument("--budget", metavar="NAME=N,...", help=text)
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (0)")
    parser.add_argument("--chunk", type=int, help="prompts steered at once (8)")
    parser.add_argument("--device", help="auto, cpu, cuda or mps")
    parser.add_argument("--no-report", action="store_true", help="write no HTML page")
    text = "where pictures, records and the page go; an interrupted run in it is continued"
    parser.add_argument("--out", required=True, metavar="DIR", help=text)


def _studio(parser: Parser) -> None:
    parser.add_argument("--port", type=int, help="port, 0 for any free one (8124)")
    parser.add_argument("--host", help="address of this machine to listen on (127.0.0.1)")
    parser.add_argument("--device", help="auto, cpu, cuda or mps")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")


def _score(parser: Parser) -> None:
    parser.add_argument("pictures", nargs="*", metavar="DIR_OR_FILE", help="pictures to score")
    parser.add_argument(
        "--images", nargs="+", default=[], metavar="DIR_OR_FILE", help="the same, as an option"
    )
    _reward(parser)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--prompt", metavar="TEXT", help="one prompt for all")
    text = "lines in order (.txt), by file name (.csv, .jsonl), or a folder of NAME.txt"
    group.add_argument("--prompts", metavar="FILE_OR_DIR", help=text)
    parser.add_argument("--out", metavar="FILE", help="write scores to a .jsonl, .csv or .parquet")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    parser.add_argument("--batch-size", type=int, help="pictures scored at once (32)")
    parser.add_argument("--device", help="where networks score: auto, cpu, cuda or mps")
    parser.add_argument("--max-pixels", type=int, help="larger pictures stay unscored (89 million)")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")


def _evaluate_reward(parser: Parser) -> None:
    text = "see: mmalign list reward-benchmarks"
    parser.add_argument("--benchmark", default="shapes_rewards", help=text)
    parser.add_argument("--data", metavar="PATH", help="the official file or folder")
    text = "names, compositions, YAML {reward: NAME, option: value}; or quick, judges, offline"
    parser.add_argument("--reward", nargs="+", required=True, metavar="SPEC", help=text)
    parser.add_argument(
        "--mode", choices=["compat", "fixed"], help="the authors' script, or as defined"
    )
    text = "option of the benchmark, as pairs=10; may be given again"
    parser.add_argument("-o", "--option", action="append", default=[], metavar="k=v", help=text)
    parser.add_argument("--out", metavar="DIR", help="where results and journals go; is continued")
    parser.add_argument("--limit", type=int, help="only so many rows of the data")
    parser.add_argument("--batch-size", type=int, help="pictures scored at once (32)")
    parser.add_argument("--frames", type=int, help="frames taken of a video (8)")
    parser.add_argument("--device", help="where networks score: auto, cpu, cuda or mps")
    parser.add_argument("--overwrite", action="store_true", help="discard answers of other rewards")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")


def _list(parser: Parser) -> None:
    parser.add_argument("kind", nargs="?", metavar="KIND", help=", ".join(_KINDS))
    parser.add_argument("name", nargs="?", metavar="NAME", help="one reward in full")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _doctor(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--no-forward", action="store_true", help="skip the tiny forward pass")


def _bench_methods(parser: Parser) -> None:
    text = (
        "compare training or steering methods, or a few-step generator with its teacher, or count "
        "a panel's flags; without it: measure speed and memory"
    )
    kinds = ["methods", "steering", "few-step", "panel"]
    parser.add_argument("what", nargs="?", choices=kinds, help=text)
    text = "bench methods, bench steering, bench panel (also --threads, --out DIR, --json)"
    group = parser.add_argument_group(text)
    group.add_argument("--methods", metavar="A,B,...", help="rows of the table (all)")
    group.add_argument("--seeds", metavar="0,1,...", help="seeds of each method (the table's)")
    group.add_argument("--nfe", type=int, help="methods: evaluations of a run (the table's)")
    text = "steering: a tuned model, folder of a pipeline or of a LoRA; --reward steers"
    group.add_argument("--tuned", metavar="FOLDER", help=text)
    text = "a shipped table (preferences, gradients, few_step, ...) or a file"
    group.add_argument("--table", metavar="NAME_OR_FILE", help=text)
    group.add_argument("--short", action="store_true", help="a rehearsal of a minute or two")
    text = "few-step: the generator that --policy was distilled from (shapes-flow)"
    group.add_argument("--teacher", metavar="NAME_OR_PATH", help=text)
    text = "few-step: network evaluations a picture (1,2,4,8,16,32)"
    group.add_argument("--evaluations", metavar="N,N,...", help=text)
    group.add_argument("--lora", metavar="PATH", help="few-step: a LoRA to load into --policy")
    text = "few-step: the difference from the teacher that counts as equal (-0.02)"
    group.add_argument("--margin", type=float, help=text)
    text = "runs side by side (1); 0 runs nothing and writes the page from what is there"
    group.add_argument("--jobs", type=int, help=text)
    group.add_argument("--markdown", metavar="FILE", help="also write the tables into this file")
    text = "archive to take ended runs from, and to keep them in (.tar.xz, not few-step)"
    group.add_argument("--records", metavar="FILE", help=text)


def _bench(parser: Parser) -> None:
    _bench_methods(parser)
    text = "the generator, or random:sd3.5-medium for that architecture with random weights"
    parser.add_argument("--policy", metavar="NAME_OR_PATH", help=text)
    parser.add_argument("--device", help="auto, cpu, cuda or mps")
    parser.add_argument("--dtype", help="auto, fp32, bf16 or fp16")
    parser.add_argument("--batch-size", type=int, help="rows of a network call and of an update")
    text = "without --policy: measure the rewards alone, in batches of these sizes (1,8,32)"
    parser.add_argument("--batch-sizes", metavar="N,N,...", help=text)
    parser.add_argument("--images", type=int, help="images of the rollout (one batch)")
    parser.add_argument("--steps", type=int, help="sampling steps (10)")
    parser.add_argument("--guidance-scale", type=float, help="guidance (the policy's own)")
    parser.add_argument("--size", type=int, help="side of the pictures in pixels (its own)")
    parser.add_argument("--repeats", type=int, help="timings of each stage (3)")
    parser.add_argument("--adapter", help="lora or full")
    parser.add_argument("--lora-rank", type=int, help="rank of the adapter (32)")
    parser.add_argument("--kl-beta", type=float, help="above 0 adds the reference pass (0)")
    text = "reward (shapes_partial); without --policy what is measured, several with spaces"
    parser.add_argument("--reward", nargs="+", metavar="REWARD", help=text)
    parser.add_argument("--attention", help="attention back-end (native)")
    parser.add_argument(
        "--gradient-checkpointing", action="store_const", const=True, help="recompute activations"
    )
    text = "run the denoiser through torch.compile (inductor, or another back-end)"
    parser.add_argument("--compile", nargs="?", const="inductor", metavar="BACKEND", help=text)
    text = "measure an evaluation end to end: generate, judge and write (shapes)"
    parser.add_argument("--evaluate", nargs="?", const="shapes", metavar="BENCHMARK", help=text)
    text = "a row for each of these objectives, or for all of them"
    parser.add_argument("--objectives", metavar="all|A,B,...", help=text)
    text = "a reward gradient through so many last steps: memory and time"
    parser.add_argument("--gradient-steps", metavar="1,2,...", help=text)
    parser.add_argument("--threads", type=int, help="CPU threads (torch's choice)")
    parser.add_argument("--out", metavar="FILE", help="also write the JSON here")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _report(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN_DIR", help="the output folder of a run")
    parser.add_argument("--out", metavar="FILE", help="the page to write (RUN_DIR/report.html)")


def _pretrain(parser: Parser) -> None:
    parser.add_argument("what", metavar="WHAT", help="which shipped model, as documented")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings to change")
    parser.add_argument("--output-dir", "--out", metavar="DIR", help="where state and weights go")


def _serve_reward(parser: Parser) -> None:
    text = "a reward, or a composition (see: mmalign list rewards)"
    parser.add_argument("reward", metavar="REWARD", help=text)
    parser.add_argument("--host", help="address to listen on (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, help="port, 0 for any free one (8123)")
    text = "variable that holds the bearer token (MMALIGN_REWARD_TOKEN, if set)"
    parser.add_argument("--token-env", metavar="VAR", help=text)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--batch", type=int, help="pictures scored at once (64)")
    text = "never score requests together: equal requests then give equal bits"
    parser.add_argument("--no-merge", action="store_true", help=text)
    parser.add_argument("--max-images", type=int, help="pictures in a request (256)")
    parser.add_argument("--max-pixels", type=int, help="pixels in a request (67108864)")
    parser.add_argument("--max-bytes", type=int, help="bytes of a request (1073741824)")
    parser.add_argument("--max-waiting", type=int, help="requests waiting at once (64)")


def _judge_check(parser: Parser) -> None:
    parser.add_argument("--judge", required=True, metavar="NAME", help="see: mmalign list rewards")
    parser.add_argument(
        "-o", "--option", action="append", default=[], metavar="k=v", help="of the judge, url=..."
    )
    parser.add_argument(
        "--images", required=True, nargs="+", metavar="DIR_OR_FILE", help="pictures that fit"
    )
    parser.add_argument("--prompts", required=True, metavar="FILE", help="one for each picture")
    parser.add_argument("--size", type=int, help="side of the square all pictures are resized to")
    parser.add_argument("--repeats", type=int, default=3, help="judgements for agreement (3)")
    parser.add_argument("--out", metavar="FILE.json", help="also write JSON, and a .md beside it")


def _train_reward(parser: Parser) -> None:
    parser.add_argument(
        "overrides", nargs="*", metavar="FILE.yaml|a.b=c", help="configuration and settings"
    )
    parser.add_argument("--output-dir", metavar="DIR", help="where the reward is written")
    parser.add_argument("--no-resume", action="store_true", help="start over")
    parser.add_argument("--show", action="store_true", help="print the configuration and stop")


def _label(parser: Parser) -> None:
    text = "pairs (.jsonl), or a folder with several pictures of a prompt"
    parser.add_argument("tasks", nargs="?", metavar="TASKS", help=text)
    parser.add_argument("--out", metavar="FILE.jsonl", help="where labels go; continued if there")
    text = "a link for this person (repeatable); without it the page asks for a name"
    parser.add_argument("--annotator", action="append", default=[], metavar="NAME", help=text)
    parser.add_argument("--summary", metavar="FILE.jsonl", help="print agreement and stop")
    text = "of a folder of pictures, as for score (NAME.txt beside each)"
    parser.add_argument("--prompts", metavar="FILE_OR_DIR", help=text)
    parser.add_argument("--image-root", metavar="DIR", help="where paths in TASKS start (its own)")
    text = "compare every two pictures of a prompt, not each with the next"
    parser.add_argument("--all-pairs", action="store_true", help=text)
    text = "leave out pairs with a picture that cannot be read"
    parser.add_argument("--skip-broken", action="store_true", help=text)
    parser.add_argument("--seed", type=int, default=0, help="of orders and sides (0)")
    parser.add_argument("--repeat", type=float, default=0.1, help="share shown again later (0.1)")
    text = "draw which picture is on the left (yes)"
    parser.add_argument("--swap", action=argparse.BooleanOptionalAction, default=True, help=text)
    parser.add_argument("--host", help="address to listen on (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, help="port, 0 for any free one (8124)")
    text = "token of the link (MMALIGN_LABEL_TOKEN, or a new one each time)"
    parser.add_argument("--token", metavar="TEXT", help=text)
    parser.add_argument("--no-token", action="store_true", help="ask for none; loopback only")
    text = "another name the server is asked under, as behind a proxy (repeatable)"
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help=text)


def _calibrate(parser: Parser) -> None:
    text = "reference pictures, as samples of the policy before training"
    parser.add_argument("pictures", nargs="*", metavar="DIR_OR_FILE", help=text)
    parser.add_argument(
        "--images", nargs="+", default=[], metavar="DIR_OR_FILE", help="the same, as an option"
    )
    _reward(parser)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--prompt", metavar="TEXT", help="one prompt for all")
    text = "lines in order (.txt), by file name (.csv, .jsonl), or a folder of NAME.txt"
    group.add_argument("--prompts", metavar="FILE_OR_DIR", help=text)
    parser.add_argument("--out", required=True, metavar="FILE.json", help="the file to write")
    parser.add_argument("--batch-size", type=int, help="pictures scored at once (32)")
    parser.add_argument("--device", help="where networks score: auto, cpu, cuda or mps")


COMMANDS: dict[str, tuple[str, Callable[[Parser], None]]] = {
    "train": ("align a generator as a recipe says", _train),
    "steer": ("better pictures at inference time, no weights touched", _steer),
    "studio": ("a page on this machine to steer prompts and watch", _studio),
    "score": ("score pictures with reward models", _score),
    "serve-reward": ("score pictures for other machines, over HTTP", _serve_reward),
    "train-reward": ("train a reward model on comparisons, ratings or labels", _train_reward),
    "label": ("compare pictures in a browser, for training on the labels", _label),
    "prefs": ("check a file of preferred pictures, or make one", _prefs),
    "calibrate": ("reference values that put a reward on a scale", _calibrate),
    "evaluate": ("run a generator through a benchmark", _evaluate),
    "data": ("official files of benchmarks: list, get, check", _data),
    "compare": ("results of one benchmark, prompt by prompt", _compare),
    "leaderboard": ("every result below a folder in one page", _leaderboard),
    "evaluate-reward": ("rank rewards and judges by human preferences", _evaluate_reward),
    "list": ("what there is: rewards, policies, recipes, ...", _list),
    "doctor": ("what this machine can run and what is missing", _doctor),
    "preflight": ("check a recipe with one rollout before training", _recipe),
    "bench": ("measure speed and memory of a policy", _bench),
    "report": ("write the HTML page of a finished or running run", _report),
    "pretrain": ("make a shipped small model again", _pretrain),
    "judge-check": ("how far a judge can be trusted: bias, attacks, agreement", _judge_check),
}


def build_parser() -> Parser:
    """The whole command line; building it imports nothing heavy."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = argparse.ArgumentParser(
        prog="mmalign",
        description="Align text-to-image and text-to-video generators with rewards.",
        epilog="'mmalign COMMAND --help' explains a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mmalign {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (summary, add_arguments) in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=summary, parents=[shared], allow_abbrev=False
        )
        add_arguments(command)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse arguments. Overrides may stand before, between and after options."""
    parser = build_parser()
    args, extra = parser.parse_known_args(argv)
    # argparse takes positional arguments from one place only; the rest arrives here.
    late = [e for e in extra if "=" in e and not e.startswith("-")] if "overrides" in args else []
    unknown = [e for e in extra if e not in late]
    if unknown:
        parser.error(f"{args.command}: unrecognized arguments: {' '.join(unknown)}")
    if late:
        args.overrides = [*args.overrides, *late]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, 1 (a check failed), 2 (an error) or 130 (interrupted)."""
    args = parse(argv)
    try:
        module = args.command.replace("-", "_")
        return int(importlib.import_module(f"mmalign.commands.{module}").run(args) or 0)
    except KeyboardInterrupt:
        print("mmalign: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.debug or not is_expected(error):
            raise
        print(f"mmalign: error: {error}", file=sys.stderr)
        return 2


def is_expected(error: BaseException) -> bool:
    """Whether an error is one we raise for the user to read: message, no traceback.

    True for operating-system errors, for exception classes of our own, and for a plain
    ``ValueError`` raised by a line of our own code.
    """
    if isinstance(error, OSError) or type(error).__module__.split(".")[0] in _OURS:
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    return isinstance(error, ValueError) and module.split(".")[0] in _OURS


if __name__ == "__main__":
    sys.exit(main())
