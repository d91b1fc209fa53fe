"""``mmalign steer``."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.commands.common import prompts_of, table

if TYPE_CHECKING:
    from PIL.Image import Image


def run(args: Namespace) -> int:
    """Steer, then write one PNG a prompt, ``steer.json`` and a contact sheet."""
    from mmalign import api
    from mmalign.config import apply_overrides
    from mmalign.runtime.files import make_directory

    options = apply_overrides({}, args.option)
    out = make_directory(args.out)  # before anything is computed
    prompts = prompts_of(args) or []
    reward = args.reward
    result = api.steer(args.policy, prompts, reward, args.method, seed=args.seed, **options)
    write(result, out, {"policy": args.policy, "method": args.method, "options": options})
    values = _values(result.scores)
    rows = [[f"{i:04d}.png", _text(values[i]), p] for i, p in enumerate(result.prompts)]
    print(table(rows, ["image", "score", "prompt"]))
    spent = f"{result.nfe} network evaluations, {result.reward_calls} reward calls"
    print(f"{len(result.candidates)} candidates, {spent}; written to {out}")
    return 0


def _values(score: Any) -> list[float | None]:
    """Scores as numbers, ``None`` where unscored."""
    pairs = zip(score.value.tolist(), score.valid.tolist(), strict=True)
    return [value if valid else None for value, valid in pairs]


def _text(value: float | None) -> str:
    return "unscored" if value is None else f"{value:.4f}"


def write(result: Any, out: Path, settings: dict[str, Any]) -> None:
    """Write the pictures and the record of a steering run into ``out``."""
    from mmalign.runtime.files import atomic_path, atomic_write_json, storage_errors
    from mmalign.runtime.versions import environment

    images = result.media.to_pil()
    for i, image in enumerate(images):
        with atomic_path(out / f"{i:04d}.png") as partial:
            image.save(partial, format="PNG")
    values = _values(result.scores)
    labels = [f"{_text(v)}  {p}" for v, p in zip(values, result.prompts, strict=True)]
    with atomic_path(out / "contact_sheet.png") as partial:
        contact_sheet(images, labels).save(partial, format="PNG")
    if result.media.kind == "video":
        with storage_errors(out):
            _write_videos(result.media.data, out)
    record = {**settings, **_record(result), "environment": environment()}
    atomic_write_json(out / "steer.json", record)


def _record(result: Any) -> dict[str, Any]:
    candidates = [
        {**dict(line), "score": value}
        for line, value in zip(result.lineage, _values(result.candidate_scores), strict=True)
    ]
    return {
        "reward": result.scores.identity,
        "prompts": list(result.prompts),
        "scores": _values(result.scores),
        "chosen": list(result.chosen),
        "candidates": candidates,
        "nfe": result.nfe,
        "reward_calls": result.reward_calls,
    }


def _write_videos(videos: Any, out: Path) -> None:
    from mmalign.types import Media

    for i, video in enumerate(videos):
        first, *rest = Media(video).to_pil()  # the frames of one video are a batch of images
        first.save(out / f"{i:04d}.gif", save_all=True, append_images=rest, duration=125, loop=0)


def contact_sheet(images: Sequence[Image], labels: Sequence[str], columns: int = 4) -> Image:
    """Pictures on one sheet with a line of text under each; small ones are enlarged."""
    from PIL import Image, ImageDraw

    side, line = max(192, *images[0].size), 18
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + 8) + 8, rows * (side + line + 8) + 8), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        scale = side / max(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        x, y = 8 + i % columns * (side + 8), 8 + i // columns * (side + line + 8)
        sheet.paste(image.resize(size, Image.Resampling.NEAREST if scale > 1 else None), (x, y))
        shown = label if len(label) <= side // 6 else label[: side // 6 - 3] + "..."
        draw.text((x, y + side + 3), shown.encode("ascii", "replace").decode(), fill="black")
    return sheet
