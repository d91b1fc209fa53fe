"""``mmalign calibrate``."""

from __future__ import annotations

from argparse import Namespace

from mmalign.commands.common import CommandError, given, image_files


def run(args: Namespace) -> int:
    """Score reference pictures and keep the values that put a reward on a scale."""
    from mmalign import api
    from mmalign.captions import captions

    files = image_files([*args.pictures, *args.images])
    if not files:
        raise CommandError("give the reference pictures: files or folders")
    prompts = None if args.prompt is None else [args.prompt] * len(files)
    options = given(batch_size=args.batch_size, device=args.device)
    if args.prompts is not None:
        texts = captions(files, args.prompts)
        prompts = [prompt for prompt, _ in texts]
        if any(facts for _, facts in texts):
            options["context"] = [facts for _, facts in texts]
    known = api.calibrate(files, prompts, args.reward, args.out, progress=True, **options)
    several = sum(len(values) > 1 for values in known.prompts.values())
    print(
        f"{len(known.values)} of {len(files)} pictures scored by {known.reward}: mean "
        f"{known.mean:.4f}, deviation {known.std:.4f}, quantiles 5 % {known.quantile(0.05):.4f}, "
        f"50 % {known.quantile(0.5):.4f}, 85 % {known.quantile(0.85):.4f}, "
        f"95 % {known.quantile(0.95):.4f}; {len(known.prompts)} prompts, {several} of them with "
        f"several pictures. Written to {args.out}"
    )
    return 0
