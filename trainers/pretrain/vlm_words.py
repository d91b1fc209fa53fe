"""The words that the small VLM's tokenizer knows whole; everything else falls back to bytes."""

from __future__ import annotations

import random
from itertools import pairwise

from mmalign.assets import asset
from mmalign.shapes import TASKS, sample_spec
from trainers.pretrain.vlm_judge import (
    ALL_ASKERS,
    JUDGE_KINDS,
    PAIR_KINDS,
    answer_forms,
    compare_as_judge,
    phrases,
    written_rubric,
)  # fmt: skip
from trainers.pretrain.vlm_pictures import render_pictures
from trainers.pretrain.vlm_questions import KINDS, ask, wordings

# Words of instructions, rubrics and verdicts in general.
GENERAL = """
a about above absent accuracy accurate acceptable add added addition additional adherence aesthetic
after alignment all also always an and another answer answers any appealing appear appears are
artefact artefacts artifact artifacts as asked aspect aspects assess at attribute attributes
attribution average background bad balance based be because been before below best better between
blurry both bounding break brief briefly but by can candidate caption captions careful carefully
check checks choose clean clear clearly closely clutter coherence coherent color colors colour
colours compare compared comparison complete completely composition concise conclude condition
confidence consider consistent contain contains content contrast correct correctly count counting
counts criteria criterion critique deformed degree describe described description detail detailed
details did differ difference different distorted do does dominant draw drawn each edge edges either
empty equal equally error errors evaluate evaluation evaluator every exact exactly example excellent
expected expert explain explanation extra extreme extremely fail failed fails fair fairly faithful
faithfully faithfulness false fault faults few figure final find first fit fits five follow followed
following follows for format found four from fully further general generate generated give given
gives good great half harmony has have high higher highest holds how human if ignore image images in
including incorrect independently instruction instructions integer into is it its item items json
judge judged judgement judgment just justification keep key kind large least left less level levels
line lines list little located location looks low lower lowest main major many mark match matched
matches matching may mean meets mentioned minor missing mistake mistakes more most much must name
natural naturalness nearly need needs neither no noise none not note nothing number numbers object
objects of on one only opinion or order original other others out outlines output over overall
partial partially partly people per perfect perfectly photo physical picture pictures place placed
please point points poor position positions possible present prompt properly provide quality
question questions range rate rating ratio read reason reasoning reasons refined reference regard
relation relations relative relevant reply request requested require required requirement
requirements requires respect respond response result return rewrite right rubric same satisfied
satisfies say scale score scored scores scoring second see separate several severe shape shaped
shapes sharp short should show showing shown shows side similar simple single size slightly small
so some source spatial stated statement statements step steps strict strictly strong style subject
such sum summary task terms text than that the their them then there these they thing things think
this those three tie to together total true two unacceptable unclear under understand unnatural
unreadable up use user using value verdict verdicts very violated visible visual was way weight well
were what when where whether which while who whole whose why will win winner with within without
word words worse worst would write written wrong yes you your zero
"""


def corpus(samples: int = 4000) -> tuple[list[str], list[str]]:
    """Texts whose words deserve a token, and phrases that deserve one as a whole."""
    rng = random.Random("vlm corpus")
    pictures = render_pictures([sample_spec(rng, "train", t) for t in TASKS * 20], rng)
    kinds = {**KINDS, **JUDGE_KINDS}
    asked = [ask(rng.choice(pictures), rng, "test", kinds, ALL_ASKERS) for _ in range(samples)]
    asked += [written_rubric(p.spec) for p in pictures]
    for first, second in pairwise(pictures):
        compared = [compare_as_judge(k, first, second, first.spec) for k in PAIR_KINDS]
        asked += [q for q in compared if q is not None]
    texts = [text for q in asked for text in (q.text, q.answer)]
    texts += [f"{lead}{w}" for w in GENERAL.split() for lead in ("", " ")]
    texts += [w.capitalize() for w in GENERAL.split()]
    texts += [f"{lead}{n}" for n in range(101) for lead in ("", " ")]
    texts += [p.read_text(encoding="utf-8") for p in sorted(asset("judge").glob("*.txt"))]
    return texts, [*phrases(), *wordings(), *answer_forms([q.answer for q in asked])]
