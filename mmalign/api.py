"""The verbs as Python functions: train, steer, score, evaluate, and what stands beside them.

This is where the packages of the suite are put together; each is imported when it is needed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from eval.result import EvalResult
    from mmalign.protocols import Steered
    from mmalign.types import Score
    from vision_rewards.compose import Reference


# --- score ------------------------------------------------------------------------------------


def score(
    media: Any,
    prompts: str | Sequence[str] | None,
    reward: Any,
    *,
    context: Sequence[Mapping[str, Any]] | None = None,
    batch_size: int = 32,
    max_pixels: int | None = None,
    journal: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
    device: str = "auto",
) -> Score:
    """Score pictures. Higher is better; what could not be judged is ``valid=False`` with a note.

    ::

        mmalign.score(["a.png", "b.png"], "a photo of a red star", "shapes_strict")
        mmalign.score("folder", None, "jpeg_compressibility")
        mmalign.score(images, prompts, {"shapes_partial": 1.0, "jpeg_compressibility": 0.01})
        mmalign.score(images, prompts, lambda images, prompts: [i.width for i in images])

    Args:
        media: a path, a folder, a Pillow image, a list of these (sizes may differ), a tensor
            ``(B, C, H, W)`` or ``(B, T, C, H, W)`` in [0, 1], or :class:`~mmalign.types.Media`.
        prompts: one for all, one each, or ``None`` where the reward needs none.
        reward: whatever :func:`vision_rewards.factory.load_reward` takes.
        context: further facts for each picture, for rewards that need them.
        batch_size: pictures handed to the reward at once; of a reward that compares the pictures
            of a prompt at least as many as a prompt has.
        max_pixels: larger files stay unscored; by default Pillow's bound, 89 million.
        journal: a file that keeps finished scores; an interrupted run in it is continued.
        overwrite: start again where the journal holds scores of another reward.
        progress: show rate and time left on standard error.
        device: where the reward works. ``auto`` is a CUDA GPU where there is one; media and
            tensors are scored where they are.

    Returns:
        ``B`` scores in the order of the pictures, without gradients; for gradients call the
        reward model itself. A reward that raises leaves its batch unscored, with the reason, and
        so does a file that cannot be read.

    Raises:
        ValueError: no pictures, not one prompt or context for each, or a reward that needs more.
        UnknownNameError: unknown reward; names the nearest.
        JournalError: the journal belongs to another reward.
    """
    from mmalign.pictures import MAX_PIXELS, open_pictures
    from mmalign.scoring import Journal, prompts_for, score_pictures, scoring_device
    from vision_rewards.factory import load_reward
    from vision_rewards.guard import GuardedReward

    model = GuardedReward(load_reward(reward), max_failed_share=1.0)
    pictures = open_pictures(media)
    texts = prompts_for(prompts, len(pictures), model.info)
    keep = nullcontext() if journal is None else Journal(journal, model.identity, overwrite)
    with keep as book:
        return score_pictures(
            model,
            pictures,
            texts,
            context,
            batch_size=batch_size,
            max_pixels=MAX_PIXELS if max_pixels is None else max_pixels,
            journal=book,
            progress=progress,
            device=scoring_device(device, pictures),
        )


def calibrate(
    media: Any,
    prompts: str | Sequence[str] | None,
    reward: Any,
    out: str | Path,
    **options: Any,
) -> Reference:
    """Score reference pictures and write the values that compositions put a reward on a scale by.

    ::

        api.calibrate("runs/before", prompts, "pickscore", "pickscore.json")
        reward = {"compose": "calibrated", "parts": ["pickscore"], "reference": "pickscore.json"}

    Args:
        media, prompts, reward, options: as in :func:`score`.
        out: the JSON file to write.

    Raises:
        CalibrationError: fewer than two pictures could be scored.
    """
    from mmalign.pictures import open_pictures
    from mmalign.runtime.files import make_directory
    from vision_rewards.compose import Reference

    make_directory(Path(out).parent)  # before the work, not after
    pictures = open_pictures(media)
    scores = score(pictures, prompts, reward, **options)
    if prompts is None or isinstance(prompts, str):
        prompts = [prompts or ""] * len(scores)
    reference = Reference.of(scores, prompts)
    reference.save(out)
    return reference


# --- evaluate ---------------------------------------------------------------------------------


def evaluate(
    policy: Any = None,
    benchmark: Any = "shapes",
    *,
    images: str | Path | None = None,
    layout: str | None = None,
    out: str | Path | None = None,
    lora: str | Path | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 32,
    pin: int | None = None,
    swap: bool = False,
    limit: int | None = None,
    strict: bool = False,
    samples_per_prompt: int | None = None,
    data: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    device: str = "auto",
    report: bool = True,
    table: str | Path | None = None,
    export: str | Path | None = None,
    label: str = "",
    progress: bool = True,
) -> EvalResult:
    """Run a generator, or pictures, through a benchmark: numbers per task with 95 % intervals.

    ::

        result = mmalign.evaluate("shapes-flow", limit=60)
        print(result.accuracy.mean, result.tasks["counting"].accuracy)
        mmalign.evaluate(pipeline, out="runs/before", dtype="bf16")  # pictures, JSON, HTML
        mmalign.evaluate("shapes-flow", lora="runs/a/lora", out="runs/after")

    Args:
        policy: a policy, a diffusers pipeline object (used in place), or a shipped name, folder
            or hub name.
        benchmark: a registered name or a :class:`~mmalign.protocols.Benchmark`.
        images: in place of a policy, a folder of pictures in ``layout``.
        layout: a name in :data:`eval.layouts.LAYOUTS`; the benchmark's own by default.
        out: folder for results; an interrupted run in it is continued. ``None`` keeps nothing.
        lora: a LoRA file or folder to load into the pipeline first.
        steps, guidance_scale: ``None`` takes the policy's recommended sampler.
        batch_size: pictures generated at once; does not change what is asked for.
        pin: pictures of every network call, so that no bit depends on the batch size; 8 on a CPU,
            0 for whatever the batch holds, which other devices do.
        swap: generate everything first, then judge: generator and judges never share the device.
        limit: only the first requests, balanced over tasks.
        strict: an unscored or missing picture, or anything odd, is an error.
        samples_per_prompt, data, options: pictures of each prompt, the official files, and the
            benchmark's own options, where ``benchmark`` is a name.
        dtype: autocast precision (``fp32``, ``bf16``, ``fp16``, ``auto``); part of the settings
            that must agree for a run to be continued. ``None`` leaves the weights' own.
        device: ``auto`` is the best there is, for a pipeline or policy object where it is.
        report: write ``report.html`` into ``out``.
        table: a ``.jsonl``, ``.csv`` or ``.parquet`` file for a line a picture.
        export: a folder for copies of the pictures in ``layout``.
        label: free text for reports, such as ``before``.
        progress: show progress with time left on standard error.

    Raises:
        UnknownNameError: unknown policy, benchmark, layout, device or precision.
        SettingsMismatchError: ``out`` holds an evaluation made with other settings.
        LayoutError: a folder that is not in the layout. GapError: under ``strict``.
        ValueError: options that do not go together.
    """
    from eval.entry import evaluate as run

    own = {"samples_per_prompt": samples_per_prompt, "data": data, **(options or {})}
    shared = {"out": out, "batch_size": batch_size, "limit": limit, "strict": strict}
    return run(
        policy, benchmark, images=images, layout=layout, lora=lora, device=device, dtype=dtype,
        pin=pin, steps=steps, guidance_scale=guidance_scale, swap=swap, benchmark_options=own,
        report=report, table=table, export=export, label=label, progress=progress, **shared,
    )  # fmt: skip


# --- steer ------------------------------------------------------------------------------------


def steer(
    policy: Any,
    prompts: str | Sequence[str],
    reward: Any,
    method: Any = "best_of_n",
    *,
    seed: int | None = None,
    budget: Any = None,
    watch: Any = None,
    device: str = "auto",
    lora: str | Path | None = None,
    **options: Any,
) -> Steered:
    """Better pictures at inference time; no weights are touched.

    ::

        result = mmalign.steer("shapes-flow", ["a photo of a red star"], "shapes_partial", n=16)
        result.media.to_pil()[0].save("star.png")
        print(result.scores.value, result.nfe)

    Args:
        policy, device, lora: as in :func:`evaluate`.
        prompts: one, or several; one picture is returned for each.
        reward: whatever :func:`vision_rewards.factory.load_reward` takes. Where it raises, the
            candidates are unscored and never chosen.
        method: a registered name, or a :class:`~mmalign.protocols.Steerer`.
        seed: seed of the noise (0), where ``method`` is a name.
        budget: limits for each prompt, as :meth:`mmalign.steering.Budget.of` takes them:
            ``"nfe=400"``, ``{"seconds": 30}``.
        watch: called with each :class:`~mmalign.protocols.Snapshot` on the way.
        options: the method's own, such as ``n=16``.

    Raises:
        UnknownNameError: unknown policy, reward, method or option; names the nearest.
        ValueError: the reward cannot judge what the policy makes, or scored no candidate.
        BudgetError: the budget is too small for the method.
    """
    from mmalign.policies.load import policy_on
    from mmalign.steering import build_steerer
    from vision_rewards.factory import load_reward
    from vision_rewards.guard import GuardedReward

    steerer = build_steerer(method, seed, options)
    model = GuardedReward(load_reward(reward), max_failed_share=1.0)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    on = policy_on(policy, device, lora)
    return steerer.run(on, model, texts, budget=budget, watch=watch)  # type: ignore[no-any-return]


# --- train ------------------------------------------------------------------------------------


def train(
    recipe: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    output_dir: str | Path | None = None,
    reward: Any = None,
    preflight: bool = True,
    resume: bool = True,
    report: bool = True,
) -> Path:
    """Align a generator as a recipe says; returns the output folder.

    ::

        mmalign.train("shapes_flow_grpo", ["optim.lr=1e-4"], output_dir="runs/a")

    Args:
        recipe: a YAML file, the name of a shipped recipe, or a mapping of settings.
        overrides: ``a.b=c`` assignments.
        output_dir: where the run is written; the recipe's by default.
        reward: a reward model or function, in place of the recipe's.
        preflight: check the recipe with one rollout before a new run.
        resume: continue an earlier run in ``output_dir``; without it, such a run is an error.
        report: write ``report.html`` at the end.

    Raises:
        ConfigError: an unusable recipe, or a folder that holds another run.
        PreflightError: the recipe would not train; says why.
    """
    from eval.in_training import evaluate_in_training
    from mmalign.runtime.log import say
    from trainers import entry
    from trainers.preflight import PreflightError

    wanted = entry.resolve_recipe(recipe, overrides)
    config = entry.with_output(wanted, None if output_dir is None else str(output_dir))
    if preflight and not (Path(config.output_dir) / "config.yaml").is_file():
        checks = entry.run_preflight(config, reward)
        if not checks.ok:
            raise PreflightError(f"the recipe would not train:\n{checks.failures}")
        say(f"preflight: {len(checks.checks)} checks passed")
    folder = entry.train(config, evaluate=evaluate_in_training, resume=resume, reward=reward)
    if report and os.environ.get("RANK", "0") == "0":
        from eval.report import training_report

        say(f"report written to {training_report(folder)}")
    return folder


def preflight(
    recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, reward: Any = None
) -> Any:
    """Check a recipe with one rollout and one replay, without training."""
    from trainers import entry

    return entry.run_preflight(entry.resolve_recipe(recipe, overrides), reward)


def resolve_recipe(recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Any:
    """The recipe's configuration as it would run."""
    from trainers.entry import resolve_recipe as resolve

    return resolve(recipe, overrides)


def bench(policy: Any, **options: Any) -> Any:
    """Measure speed and memory of a policy."""
    from trainers.bench import bench as run

    return run(policy, **options)


def pretrain(
    what: str, overrides: Sequence[str] = (), *, output_dir: str | Path | None = None
) -> Path:
    """Make a shipped small model again.

    ``shapes-flow`` needs the output of ``shapes-vae``; the others need shipped models only.

    ::

        mmalign.pretrain("shapes-vae", ["steps=100"], output_dir="runs/vae")

    Args:
        what: which model.
        overrides: ``key=value`` settings of its configuration.
        output_dir: where state and weights go; an interrupted run in it is continued.

    Returns:
        The folder of the finished model.

    Raises:
        UnknownNameError: not a model that can be made. ConfigError: unknown or unusable setting.
    """
    from trainers.pretrain.jobs import pretrain as run

    return run(what, overrides, output_dir)


# --- report -----------------------------------------------------------------------------------


def report(run: str | Path, *, out: str | Path | None = None) -> Path:
    """Write the HTML page of a training run or of an evaluation and return its path.

    Args:
        run: the output folder; a training run may still be going on.
        out: the page to write; ``report.html`` in the folder by default.

    Raises:
        FileNotFoundError: not a folder, or neither kind of output in it.
    """
    from eval.report import evaluation_report, training_report
    from eval.result import EvalResult

    folder = Path(run)
    page = folder / "report.html" if out is None else Path(out)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not the output folder of a run")
    if any((folder / name).exists() for name in ("config.yaml", "run.json", "metrics.jsonl")):
        return training_report(folder, page)
    if (folder / "result.json").is_file():
        return evaluation_report(EvalResult.load(folder / "result.json"), page)
    raise FileNotFoundError(
        f"{folder} holds neither a training run (config.yaml, run.json, metrics.jsonl) nor an "
        "evaluation (result.json)"
    )
