"""``mmalign label``."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.commands.common import CommandError, given, image_files, table

if TYPE_CHECKING:
    from vision_rewards.labelling.server import Access
    from vision_rewards.labelling.tasks import Pair

TOKEN = "MMALIGN_LABEL_TOKEN"
EVALUATED = "samples.jsonl"  # what an evaluation writes beside its pictures


def run(args: Namespace) -> int:
    """Serve the page until interrupted, or print the agreement in a file of labels."""
    if args.summary is not None:
        _refuse_serving(args)
        print(summary(args.summary))
        return 0
    if args.tasks is None or args.out is None:
        raise CommandError("give TASKS and --out labels.jsonl, or --summary labels.jsonl")
    from mmalign.runtime.log import say
    from vision_rewards.labelling.decisions import LabelFile
    from vision_rewards.labelling.gallery import Gallery, readable_pairs
    from vision_rewards.labelling.order import check_repeat
    from vision_rewards.labelling.server import serve
    from vision_rewards.labelling.session import Session, name_of_annotator

    reachable, out = access(args), Path(args.out)
    names = [name_of_annotator(name) for name in args.annotator]
    check_repeat(args.repeat)
    _refuse_same(out, Path(args.tasks))
    root = out.parent.resolve()
    pairs, broken = readable_pairs(
        tasks(args, root), root, skip_broken=args.skip_broken, progress=True
    )
    for fault in broken:
        say(f"left out: {fault}")
    gallery = Gallery(file for pair in pairs for file in pair.files(root))
    file = LabelFile(out)
    try:
        order: dict[str, Any] = {"seed": args.seed, "repeat": args.repeat, "swap": args.swap}
        session = Session(pairs, file, **order)
        say(f"{len(pairs)} pairs, {len(file.rows)} lines in {out} already; Ctrl-C ends the server")
        where: dict[str, Any] = given(port=args.port)
        serve(session, gallery, reachable, annotators=names, started=_print, **where)
    finally:
        file.close()
    return 0


def _print(links: Sequence[str]) -> None:
    print("\n".join(links), flush=True)


def access(args: Namespace) -> Access:
    """Who may reach the server: the token of the line, of the environment, or a new one."""
    from vision_rewards.labelling.server import Access

    if args.no_token and args.token is not None:
        raise CommandError("--token and --no-token exclude each other")
    options: dict[str, Any] = given(host=args.host, token=args.token or os.environ.get(TOKEN))
    if args.no_token:
        options["token"] = None
    return Access(names=tuple(args.allow_host), **options)


def _refuse_serving(args: Namespace) -> None:
    if args.tasks is not None or args.out is not None:
        raise CommandError("--summary reads labels and serves nothing: leave out TASKS and --out")


def _refuse_same(out: Path, source: Path) -> None:
    if out.is_dir():
        raise CommandError(f"--out {out} is a folder; name a file in it, as {out / 'labels.jsonl'}")
    if out.exists() and source.exists() and out.samefile(source):
        raise CommandError(f"--out is the file of tasks, {out}; labels go into one of their own")


def tasks(args: Namespace, root: Path) -> list[Pair]:
    """The pairs that TASKS names, with paths from ``root``, the folder of the labels."""
    from vision_rewards.labelling.tasks import Sample, pairs_of_samples, read_tasks

    source = Path(args.tasks)
    options: dict[str, Any] = {"every": args.all_pairs, "seed": args.seed}
    if not source.is_dir():
        if args.prompts is not None:
            raise CommandError("--prompts is for a folder of pictures; TASKS is a file")
        where = None if args.image_root is None else Path(args.image_root)
        return read_tasks(source, root, image_root=where, **options)
    if args.image_root is not None:
        raise CommandError("--image-root is for a file of tasks; TASKS is a folder")
    if args.prompts is None and (source / EVALUATED).is_file():
        return read_tasks(source / EVALUATED, root, **options)
    from mmalign.captions import captions

    files = image_files([str(source)])
    found = captions(files, source if args.prompts is None else args.prompts)
    samples = [Sample(text, file) for (text, _), file in zip(found, files, strict=True)]
    return pairs_of_samples(samples, root, **options)


def summary(path: str) -> str:
    """The agreement in a file of labels as text.

    Raises:
        CommandError: no such file, or nothing in it.
    """
    from mmalign.runtime.log import read_jsonl
    from vision_rewards.labelling.agreement import agreement

    rows = read_jsonl(path)
    if not rows:
        raise CommandError(f"{path} does not exist or is empty; there is nothing to sum up")
    try:
        found = agreement(rows)
    except (KeyError, TypeError, ValueError) as error:
        raise CommandError(f"{path} is no file of compared pairs: {error!r}") from error
    people = f"{len(found['annotators'])} annotators"
    blocks = [f"{found['judgements']} judgements of {found['pairs']} pairs by {people}"]
    return "\n\n".join([*blocks, *_between(found), _annotators(found["annotators"])])


def _between(found: Mapping[str, Any]) -> list[str]:
    all_ = found["between"]
    if not all_["pairs"]:
        return ["no pair was judged by two annotators"]
    names = {
        "raw": "same answer",
        "alpha_ordinal": "Krippendorff's alpha, ordinal",
        "alpha_nominal": "Krippendorff's alpha, nominal",
    }
    rows = [[text, all_[key]["value"], _interval(all_[key])] for key, text in names.items()]
    rows.insert(1, ["same answer where neither said tie", all_["without_ties"], ""])
    two = [
        [
            " and ".join(t["users"]),
            t["raw"]["n"],
            t["raw"]["value"],
            _interval(t["raw"]),
            t["kappa"],
        ]
        for t in found["two"]
    ]
    header = ["annotators", "shared", "same answer", "95 % interval", "kappa"]
    return [
        table(rows, [f"{all_['pairs']} shared pairs", "value", "95 % interval"]),
        table(two, header),
    ]


def _annotators(found: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            a["user"] or "(nobody)", a["judgements"], a["ties"]["value"], a["skips"], a["undone"],
            a["left"]["value"], _interval(a["left"]), a["self"]["value"], _interval(a["self"]),
            a["seconds"],
        ]
        for a in found
    ]  # fmt: skip
    header = ["annotator", "judged", "ties", "skipped", "undone", "left side", "95 % interval",
              "same again", "95 % interval", "seconds"]  # fmt: skip
    return table(rows, header)


def _interval(share: Mapping[str, Any]) -> str:
    low, high = share["interval"]
    return "" if low is None or high is None else f"[{low:.3f}, {high:.3f}]"
