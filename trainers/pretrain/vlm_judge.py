"""The judges' own questions (:mod:`vision_rewards.judge`), answered for shapes-world pictures.

The words are those of the shipped templates, filled as the judges fill them, and the answers have
the form that the judges read. A reason always comes first: it is the verifier's complaint, and the
score follows from it.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from functools import cache

from mmalign.shapes import PromptSpec, caption
from trainers.pretrain.vlm_pictures import Picture
from trainers.pretrain.vlm_questions import (
    ASKERS,
    Asker,
    Question,
    holds,
    pick_spec,
    points,
    reason,
    statements,
    verdict_on,
)  # fmt: skip
from vision_rewards.judge.rubric import Rubric, load_rubric
from vision_rewards.judge.templates import Template, load_template, quoted
from vision_rewards.shapes import Verdict

CLEAN, PLAIN = "no object is deformed", "plain"
WHOLE = "No object is deformed."  # the criterion of quality that every rubric of ours ends with
REASON_FIRST = 'Think step by step first, then end with one line, "Answer: yes" or "Answer: no".'
ONE_WORD = "Please answer yes or no."

_template = cache(load_template)
_rubric = cache(load_rubric)


def malformed(picture: Picture) -> int:
    """Objects whose shape or colour has no name."""
    return sum(d.shape is None or d.color is None for d in picture.view.detections)


def quality(picture: Picture) -> tuple[str, int]:
    """What is said of a picture's execution, and 1 to 5 for it."""
    bad = malformed(picture)
    if not bad:
        return CLEAN, 5
    return f"{bad} object{'s are' if bad > 1 else ' is'} deformed", max(1, 5 - 2 * bad)


# --- one picture ----------------------------------------------------------------------------

Judgement = Callable[[Picture, PromptSpec, Verdict], str]


def _default(picture: Picture, spec: PromptSpec, verdict: Verdict) -> str:
    said, grade = quality(picture)
    return _filled(
        {
            "alignment": (reason(verdict), points(verdict)),
            "quality": (said, grade),
            "composition": (PLAIN, 3),
        }
    )


def _match(picture: Picture, spec: PromptSpec, verdict: Verdict) -> str:
    return _filled({"match": (reason(verdict), points(verdict))})


def _alignment(picture: Picture, spec: PromptSpec, verdict: Verdict) -> str:
    asked = {
        "objects": ("shape", True),
        "counts": ("count", True),
        "colors": ("color", any(o.color for o in spec.objects)),
        "positions": ("relation", spec.relation is not None),
    }
    rows = {}
    for name, (part, applies) in asked.items():
        right = verdict.parts[part] == 1.0
        said = ("as asked" if right else "not as asked") if applies else "not asked for"
        rows[name] = (said, (10 if right else 0) if applies else None)
    return _filled(rows)


def _filled(rows: dict[str, tuple[str, int | None]]) -> str:
    return json.dumps({n: {"reason": why, "score": score} for n, (why, score) in rows.items()})


def _overall(picture: Picture, spec: PromptSpec, verdict: Verdict) -> str:
    rows = zip(statements(spec), holds(picture, spec), strict=True)
    lines = [f"{said.rstrip('.')} ({_type_of(said)}): {int(true)}" for said, true in rows]
    return "\n".join([*lines, f"Final Score: {points(verdict)}"])


def _type_of(statement: str) -> str:
    if "exactly" in statement:
        return "count"
    if statement.startswith("There is"):
        return "object"
    return "position" if " the " in statement else "attribute"


def _axes(picture: Picture, spec: PromptSpec, verdict: Verdict) -> str:
    scores = {"Alignment": points(verdict), "Coherence": quality(picture)[1], "Style": 3}
    return "\n".join(f"{axis} Score (1-5): {score}" for axis, score in scores.items())


def _critique(picture: Picture, spec: PromptSpec, verdict: Verdict) -> str:
    said, grade = quality(picture)
    return CRITIQUE.format(
        asked=" ".join(statements(spec)), reason=reason(verdict), quality=said,
        faithful=max(1, points(verdict) - 1), clean=max(1, grade - 1), request=caption(spec),
    )  # fmt: skip


CRITIQUE = """# User Request Analysis:
{asked}

# Detailed Judgement
1. Text Faithfulness
## Justification: {reason}
## Score: {faithful}
2. Physical and Visual Quality
## Justification: {quality}
## Score: {clean}
3. Text Rendering
## Justification: no text was asked for
## Score: N/A

# Summary:
{reason}

# Refined Request:
{request}"""


def _yes(picture: Picture, spec: PromptSpec, verdict: Verdict) -> str:
    return "Yes" if verdict.strict else "No"


def _reasoned(picture: Picture, spec: PromptSpec, verdict: Verdict) -> str:
    return f"{reason(verdict)}\nAnswer: {'yes' if verdict.strict else 'no'}"


def _execution(picture: Picture, spec: PromptSpec, verdict: Verdict) -> str:
    said, grade = quality(picture)
    return json.dumps({"reasoning": said, "score": [5 * grade, 5 * grade]})


def _with_rubric(name: str) -> dict[str, str]:
    rubric: Rubric = _rubric(name)
    return {"rubric": rubric.text(), "form": rubric.form()}


_SINGLE: dict[str, tuple[str, Callable[[], dict[str, str]], Judgement]] = {
    "judge_default": ("rubric", lambda: _with_rubric("default"), _default),
    "judge_shapes": ("rubric", lambda: _with_rubric("shapes"), _match),
    "judge_alignment": ("rubric", lambda: _with_rubric("alignment"), _alignment),
    "judge_overall": ("unified_overall", dict, _overall),
    "judge_axes": ("unified_axes", dict, _axes),
    "judge_critique": ("critique", dict, _critique),
    "judge_yes": ("yes_no", lambda: {"instructions": "", "how": ONE_WORD}, _yes),
    "judge_think": ("yes_no", lambda: {"instructions": "", "how": REASON_FIRST}, _reasoned),
    "judge_quality": ("edit_score_pq", dict, _execution),
}


def _asker(kind: str) -> Asker:
    name, values, answer = _SINGLE[kind]

    def asker(picture: Picture, rng: random.Random, split: str) -> Question | None:
        spec = pick_spec(picture, rng, split)
        if spec is None or picture.view.problem or not picture.view.detections:
            return None
        text = _template(name).fill(prompt=quoted(caption(spec)), **values())
        return Question(kind, text, answer(picture, spec, verdict_on(picture, spec)))

    return asker


# --- rubrics of the judge's own -------------------------------------------------------------


def criteria(spec: PromptSpec) -> list[str]:
    """Three or more criteria for a picture of ``spec``."""
    said = statements(spec)
    return [*said, *(["There is nothing else."] if len(said) < 3 else []), WHOLE]


def written_rubric(spec: PromptSpec) -> Question:
    """The question for a rubric, which comes without picture, and the rubric."""
    text = _template("auto_rubric_write").fill(prompt=quoted(caption(spec)), examples="")
    return Question("judge_write", text, json.dumps({"criteria": criteria(spec)}))


def _met(picture: Picture, rng: random.Random, split: str) -> Question | None:
    spec = pick_spec(picture, rng, split)
    if spec is None or picture.view.problem or not picture.view.detections:
        return None
    met = holds(picture, spec)
    right_number = met[0]
    met += [right_number] if len(met) < 3 else []
    met.append(not malformed(picture))
    rows = [
        {"criterion": i, "reason": "it is so" if ok else "it is not so", "met": ok}
        for i, ok in enumerate(met, 1)
    ]
    numbered = "\n".join(f"{i}. {c}" for i, c in enumerate(criteria(spec), 1))
    fill = {"prompt": quoted(caption(spec)), "criteria": numbered}
    text = _template("auto_rubric_judge").fill(**fill)
    return Question("judge_met", text, json.dumps({"verdicts": rows}))


ALL_ASKERS: dict[str, Asker] = {
    **ASKERS, **{kind: _asker(kind) for kind in _SINGLE}, "judge_met": _met,
}  # fmt: skip
JUDGE_KINDS: dict[str, float] = {
    "judge_default": 0.5, "judge_shapes": 0.8, "judge_alignment": 0.3, "judge_overall": 0.5,
    "judge_axes": 0.4, "judge_critique": 0.4, "judge_yes": 1.0, "judge_think": 0.6,
    "judge_quality": 0.2, "judge_met": 0.5,
}  # fmt: skip


# --- two pictures ---------------------------------------------------------------------------


def _winner(verdicts: list[Verdict], ahead: int) -> str:
    why = f"A: {reason(verdicts[0])}. B: {reason(verdicts[1])}"
    return json.dumps({"reason": why, "winner": _pick(ahead, "A", "B", "tie")})


def _ranked(verdicts: list[Verdict], ahead: int) -> str:
    better = ("Image 1 is better", "Image 2 is better", "Both images are equally good")
    return _pick(ahead, *better)


def _thought(verdicts: list[Verdict], ahead: int) -> str:
    why = f"Image 1: {reason(verdicts[0])}. Image 2: {reason(verdicts[1])}"
    return f"<think>{why}</think>\n<answer>{_ranked(verdicts, ahead)}</answer>"


def _shares(verdicts: list[Verdict], ahead: int) -> str:
    first = 0.5 + 0.1 * ahead
    rows = [("Alignment", first), ("Coherence", 0.5), ("Style", 0.5)]
    return "\n".join(f"{a}:\nImage 1: {s:.1f}\nImage 2: {1 - s:.1f}" for a, s in rows)


def _pick(ahead: int, first: str, second: str, tie: str) -> str:
    return first if ahead > 0 else second if ahead < 0 else tie


_PAIRS: dict[str, tuple[str, dict[str, str], Callable[[list[Verdict], int], str], bool]] = {
    "judge_pair": ("pairwise", {}, _winner, True),
    "judge_pair_soft": ("pairwise_soft", {}, lambda v, d: _pick(d, "A", "B", ""), False),
    "judge_reference": (
        "yes_no_reference", {"instructions": "", "how": ONE_WORD},
        lambda v, d: "Yes" if d > 0 else "No", False,
    ),
    "judge_rank": ("unified_pair_rank", {}, _ranked, True),
    "judge_pair_score": ("unified_pair_score", {}, _shares, True),
    "judge_pair_think": ("unified_pair_think", {}, _thought, True),
}  # fmt: skip
PAIR_KINDS = tuple(_PAIRS)


def compare_as_judge(
    kind: str, first: Picture, second: Picture, spec: PromptSpec
) -> Question | None:
    """A judge's comparison of two pictures; ``None`` for a tie where it allows none."""
    name, values, answer, ties = _PAIRS[kind]
    if first.view.problem or second.view.problem:
        return None
    verdicts = [verdict_on(p, spec) for p in (first, second)]
    ahead = points(verdicts[0]) - points(verdicts[1])
    if not ahead and (not ties or verdicts[0].strict != verdicts[1].strict):
        return None
    text = _template(name).fill(prompt=quoted(caption(spec)), **values)
    return Question(kind, text, answer(verdicts, ahead))


# --- phrases --------------------------------------------------------------------------------

# Stretches of an answer's form that are always the same.
_FORM = re.compile(r'[{\[]?[{"}\], ]*"\w+": (?:\{"\w+": )?[\["]*|"\}+$|"\]\}$|\}\]\}$')


def phrases() -> list[str]:
    """Stretches of text that judges repeat word for word, each worth one token."""
    names = [*(n for n, *_ in _SINGLE.values()), *(n for n, *_ in _PAIRS.values())]
    files = [_template(n) for n in (*names, "auto_rubric_write", "auto_rubric_judge", "vqascore")]
    files += [Template(_rubric(r).text()) for r in ("default", "shapes", "alignment")]
    files += [Template(_rubric(r).form()) for r in ("default", "shapes", "alignment")]
    literal = [part for f in files for part in re.split(r"\{\{\w+\}\}", f.text)]
    literal += re.split(r"\{\w+\}", CRITIQUE)
    said = [line.rstrip(" ") for p in literal for line in p.splitlines(keepends=True)]
    return [*said, REASON_FIRST, ONE_WORD, "<prompt>", "</prompt>", WHOLE, CLEAN]


def answer_forms(answers: list[str]) -> list[str]:
    """The repeated JSON stretches of ``answers``."""
    return [found for text in answers for found in _FORM.findall(text)]
