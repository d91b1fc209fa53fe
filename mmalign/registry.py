"""Names to classes, lazily: listing imports nothing heavy, a typo gets its nearest match."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


class UnknownNameError(ValueError):
    """A name that a registry, a configuration or a choice does not know."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """The error for an unknown ``name``: nearest matches first, then all that is allowed."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return UnknownNameError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names) or 'none'}.")


@dataclass(frozen=True)
class Entry:
    """Where a registered object lives and what it is, in one line."""

    name: str
    target: str
    summary: str
    info: Any = None


class Registry:
    """``name -> "module:attribute"``; the module is imported on :meth:`load` only."""

    def __init__(self, kind: str, catalogue: str = "") -> None:
        """``catalogue`` names a tuple of ``(target, declaration)``, read at the first lookup."""
        self.kind = kind
        self._entries: dict[str, Entry] = {}
        self._catalogue = catalogue

    def _read_catalogue(self) -> None:
        module, _, attribute = self._catalogue.partition(":")
        self._catalogue = ""
        for target, info in getattr(importlib.import_module(module), attribute) if module else ():
            self.add(info.name, target, info.summary, info)

    def add(self, name: str, target: str, summary: str = "", info: Any = None) -> None:
        """Register ``target`` (``"package.module:attribute"``) under ``name``.

        ``info`` is what the object declares about itself, where that is known without loading it.

        Raises:
            ValueError: the name is taken by another target, or the target is malformed.
        """
        if target.count(":") != 1:
            raise ValueError(f"target {target!r} must look like 'package.module:attribute'")
        self._read_catalogue()
        taken = self._entries.get(name)
        if taken is not None and taken.target != target:
            raise ValueError(f"{self.kind} {name!r} is already registered as {taken.target}")
        self._entries[name] = Entry(name, target, summary, info)

    def load(self, name: str) -> Any:
        """Import and return the registered object.

        Raises:
            UnknownNameError: with the nearest known names.
        """
        if name not in self:
            raise unknown(self.kind, name, self._entries)
        module, attribute = self._entries[name].target.split(":")
        return getattr(importlib.import_module(module), attribute)

    def __contains__(self, name: object) -> bool:
        self._read_catalogue()
        return name in self._entries

    def __iter__(self) -> Iterator[Entry]:
        self._read_catalogue()
        return iter(sorted(self._entries.values(), key=lambda e: e.name))


REWARDS = Registry("reward", "vision_rewards.cards:CARDS")
POLICIES = Registry("policy family")
OBJECTIVES = Registry("objective")
STEERERS = Registry("steering method")
BENCHMARKS = Registry("benchmark")
REWARD_BENCHMARKS = Registry("reward benchmark")
KERNELS = Registry("kernel")

for _name, _target, _summary in (
    ("ode", "mmalign.sampling.kernels:OdeKernel", "Euler step of the probability-flow ODE"),
    ("flow_sde", "mmalign.sampling.kernels:FlowSdeKernel", "Flow-GRPO's marginal-preserving SDE"),
    ("dance_sde", "mmalign.sampling.kernels:DanceSdeKernel", "DanceGRPO's constant-noise SDE"),
    ("step_sde", "mmalign.sampling.step_sde:StepSdeKernel", "SDE with a noise level for each step"),
    ("cps", "mmalign.sampling.kernels:CpsKernel", "coefficient-preserving step (Flow-CPS)"),
    ("learned", "mmalign.sampling.learned:LearnedKernel", "Euler plus learned noise (ReinFlow)"),
    ("ddim", "mmalign.sampling.ddim:DdimKernel", "DDIM with noise, for diffusion models (DDPO)"),
    ("consistency", "mmalign.sampling.renoise:ConsistencyKernel", "predict, noise afresh (LCM)"),
):
    KERNELS.add(_name, _target, _summary)

POLICIES.add("sd", "mmalign.policies.sd:SDPolicy", "Stable Diffusion 1.x / 2.x class models")
POLICIES.add("sdxl", "mmalign.policies.sdxl:SDXLPolicy", "Stable Diffusion XL class models")
POLICIES.add("flux", "mmalign.policies.flux:FluxPolicy", "FLUX.1 class flow models")
POLICIES.add("wan", "mmalign.policies.wan:WanPolicy", "Wan 2.1 class flow models of videos")
POLICIES.add("sd3", "mmalign.policies.sd3:SD3Policy", "Stable Diffusion 3 / 3.5 class flow models")
POLICIES.add(
    "sd3_control", "mmalign.policies.control:SD3ControlPolicy", "a ControlNet on Stable Diffusion 3"
)
OBJECTIVES.add("flow_grpo", "trainers.flow_grpo:FlowGrpo", "clipped policy gradient per step")
for _name, _target, _summary in (
    ("dense_grpo", "trainers.dense_grpo:DenseGrpo", "each step credited with the reward it gained"),
    ("grpo_guard", "trainers.grpo_guard:GrpoGuard", "ratios that mean the same at every step"),
    ("vgpo", "trainers.vgpo:Vgpo", "steps weighted by value, rewards against an anchor"),
    (
        "turning_point_grpo",
        "trainers.turning_point_grpo:TurningPointGrpo",
        "steps that turn a trajectory get its long-term credit",
    ),
    ("reinflow", "trainers.reinflow:ReinFlow", "noise of each step learned with the policy"),
    ("dpok", "trainers.dpok:Dpok", "a KL at every step, with a learned value as baseline"),
    ("flow_dppo", "trainers.flow_dppo:FlowDppo", "a trust region of divergences, no clip"),
    ("euphonium", "trainers.euphonium:Euphonium", "rollouts guided by a reward's gradient"),
    ("d3po", "trainers.d3po:D3po", "DPO on every step of two trajectories of a prompt"),
    ("spo", "trainers.spo:Spo", "DPO on children of the same noisy state"),
    ("prdp", "trainers.prdp:Prdp", "reward differences regressed by log-ratios of trajectories"),
    ("rubric_po", "trainers.rubric_po:RubricPo", "who beats whom under a rubric, yes or no"),
):
    OBJECTIVES.add(_name, _target, _summary)
for _name, _target, _summary in (
    ("raft", "trainers.reward_weighted:Raft", "flow matching on the best samples of a group"),
    (
        "reward_weighted",
        "trainers.reward_weighted:RewardWeighted",
        "exponential weights (ORW-CFM-W2)",
    ),
    (
        "diffusion_nft",
        "trainers.diffusion_nft:DiffusionNft",
        "contrast of implicit good and bad policy",
    ),
    ("awm", "trainers.awm:Awm", "advantage-weighted matching"),
    ("dgpo", "trainers.dgpo:Dgpo", "group preference optimisation on noised samples"),
    ("ac_flow", "trainers.ac_flow:AcFlow", "exponential weights against a critic of noisy states"),
    ("crd", "trainers.crd:Crd", "centred rewards regressed by the model's own"),
    ("srum", "trainers.srum:Srum", "matching weighted place by place by a judge's regions"),
    (
        "lcd",
        "trainers.few_step.consistency:ConsistencyDistillation",
        "one step says where the teacher's path ends (consistency distillation)",
    ),
    (
        "rg_lcd",
        "trainers.few_step.rg_lcd:RewardGuidedConsistency",
        "consistency distillation with a reward, directly or through a latent proxy",
    ),
    ("dmd", "trainers.few_step.dmd:DistributionMatching", "few steps, as likely as the teacher's"),
    ("r0", "trainers.few_step.r0:R0", "few steps that climb several rewards, kept in bounds"),
):
    OBJECTIVES.add(_name, _target, _summary)
for _name, _target, _summary in (
    ("diffusion_dpo", "diffusion_dpo:DiffusionDpo", "preferred and rejected pictures, noised"),
    ("ipo", "ipo:Ipo", "margins of preference regressed onto a finite one"),
    ("diffusion_kto", "diffusion_kto:DiffusionKto", "pictures that were liked or not, unpaired"),
    ("mapo", "mapo:Mapo", "preferences without a reference"),
    ("inpo", "inpo:Inpo", "preferences on latents inverted by the model"),
    ("sail", "sail:Sail", "rounds of own pairs, ranked by the model's implicit reward"),
    ("rpo", "rpo:Rpo", "a subject's pictures, and a preference for them by the harmonic reward"),
):
    OBJECTIVES.add(_name, f"trainers.preferences.{_target}", _summary)
for _name, _target, _summary in (
    ("refl", "refl:Refl", "reward gradient at the clean estimate of a late step"),
    ("draft", "draft:Draft", "reward gradient through the last K steps (DRaFT-K, -LV)"),
    ("alignprop", "alignprop:AlignProp", "reward gradient through a random number of last steps"),
    ("drtune", "drtune:DrTune", "reward gradient through a few steps, inputs held constant"),
    ("surrogate", "surrogate:Surrogate", "the same along a surrogate trajectory, with a bridge"),
    ("partial", "partial:Partial", "reward gradient through edits of noised pictures"),
    ("ctrl_u", "ctrl_u:CtrlU", "a ControlNet's condition found again, weighed by uncertainty"),
):
    OBJECTIVES.add(_name, f"trainers.gradient.{_target}", _summary)
STEERERS.add("best_of_n", "mmalign.steering.best_of_n:BestOfN", "sample N, keep the best")
for _name, _target, _summary in (
    ("random_search", "mmalign.steering.noise_search:RandomSearch", "rounds of 2, 4, 8 ... noises"),
    ("zero_order", "mmalign.steering.noise_search:ZeroOrder", "walk to better and better noises"),
    ("path_search", "mmalign.steering.path_search:PathSearch", "branch on the way, keep the best"),
    ("refine", "mmalign.steering.refine:Refine", "critique pictures, word prompts anew"),
    ("fk", "mmalign.steering.fk:Fk", "particles weighed and resampled on the way"),
    ("svdd", "mmalign.steering.svdd:Svdd", "the best child at every step"),
    ("das", "mmalign.steering.das:Das", "particles proposed along the reward's gradient"),
    ("reno", "mmalign.steering.reno:Reno", "the noise of a few-step model, up the gradient"),
    ("dno", "mmalign.steering.dno:Dno", "the noises of all steps, up the gradient"),
    ("reward_guidance", "mmalign.steering.guidance:RewardGuidance", "each prediction, uphill"),
):
    STEERERS.add(_name, _target, _summary)
BENCHMARKS.add("shapes", "eval.benchmarks.shapes:ShapesBenchmark", "six GenEval tasks, offline")
for _name, _target, _summary in (
    ("shapes_control", "shapes_control:ShapesControl", "whether pictures show the map they follow"),
    ("shapes_subject", "shapes_subject:ShapesSubject", "one textured object in new compositions"),
    ("shapes_geneval", "shapes_geneval:ShapesGenEval", "GenEval's networks and rules, offline"),
    ("geneval", "geneval:GenEvalBenchmark", "six tasks judged by a detector (GenEval)"),
    ("t2i_compbench", "compbench:T2ICompBench", "attributes, positions, numbers, actions"),
    ("dpg_bench", "dpg:DPGBench", "long prompts, a graph of questions each"),
    ("unigenbench", "unigenbench:UniGenBench", "test points in 27 dimensions, by a judge"),
    ("hpsv2", "hpsv2:HPSv2Benchmark", "four styles, by HPSv2"),
    ("parti", "prompt_sets:PartiPrompts", "PartiPrompts, by any reward"),
    ("drawbench", "prompt_sets:DrawBench", "DrawBench, by any reward"),
    ("pickscore", "prompt_sets:PickScorePrompts", "prompts of Pick-a-Pic's users"),
    ("ocr", "prompt_sets:OcrBenchmark", "quoted words have to be readable"),
    ("genai_bench", "prompt_sets:GenAIBenchPrompts", "compositional prompts, by VQAScore"),
    ("wise", "wise:Wise", "world knowledge, by a judge"),
    ("vbench", "vbench:VBench", "prompts for videos in 16 dimensions, by any reward of videos"),
    ("dreambench", "dreambench:DreamBench", "one subject in new places: DINO, CLIP-I, CLIP-T"),
    ("fid", "fid:FidBenchmark", "FID, KID, CMMD to a folder of captioned pictures"),
    ("diversity", "diversity:Diversity", "how different the pictures of one prompt are"),
    ("efficiency", "efficiency:Efficiency", "pictures a second, latency, memory"),
):
    BENCHMARKS.add(_name, f"eval.benchmarks.{_target}", _summary)
for _name, _target, _summary in (
    ("shapes_rewards", "shapes:ShapesRewards", "controlled differences of known truth, offline"),
    ("pick_a_pic", "pick_a_pic:PickAPic", "Pick-a-Pic: which of two pictures people chose"),
    ("hpdv2", "rankings:Hpdv2", "HPDv2: rankings of pictures of one prompt"),
    ("image_reward", "rankings:ImageRewardTest", "ImageReward's test: rankings with ties"),
    ("genai_bench", "genai:GenAIBench", "TIGER GenAI-Bench: votes with two kinds of ties"),
    ("edit_reward_bench", "edit_reward:EditRewardBench", "edits of a picture, by task"),
    ("videogen_reward_bench", "videogen:VideoGenRewardBench", "pairs of videos, four dimensions"),
    ("videoscore_bench", "videoscore:VideoScoreBench", "videos rated 1 to 5, three dimensions"),
    ("vl_reward_bench", "answer_files:VLRewardBench", "two answers about a picture"),
    ("mm_rlhf_reward_bench", "answer_files:MMRLHFRewardBench", "answers, ACC and ACC+"),
    ("video_reward_bench", "answer_files:VideoRewardBench", "two answers about a video"),
    ("vlrm_bench", "answer_files:VLRMBench", "a right and a wrong solution"),
    ("answer_pairs", "answer_files:AnswerPairs", "any two answers, from JSON lines"),
):
    REWARD_BENCHMARKS.add(_name, f"eval.reward_benchmarks.{_target}", _summary)
