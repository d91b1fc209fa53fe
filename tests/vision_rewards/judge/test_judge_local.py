"""The local back-end on a real, tiny Llava model."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmalign.types import Media
from vision_rewards.judge.backend import Backend, BackendError, Query
from vision_rewards.judge.local import GumbelNoise, LocalBackend
from vision_rewards.judge.yes_no import VqaScore, YesNoJudge


@pytest.fixture(scope="module")
def backend(tiny_vlm):
    return LocalBackend(tiny_vlm, batch_size=4)


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    """Random pictures ``(count, 3, 16, 16)``."""
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_it_is_a_backend(backend):
    assert isinstance(backend, Backend)
    assert len(backend.networks()) == 1


def test_probabilities_are_the_models_own(backend):
    query = Query(text="is it red ?", images=(pictures(1)[0],), choices=("yes", "no"), max_tokens=1)
    (reply,) = backend.ask([query])
    inputs = backend._inputs([query])
    with torch.no_grad():
        logs = backend.model(**inputs).logits[0, -1].log_softmax(-1)
    both = logs[backend.tokenizer.convert_tokens_to_ids(["yes", "Yes"])].logsumexp(0)
    assert reply.choice_log_probs["yes"] == pytest.approx(both.item(), abs=1e-5)
    assert reply.tokens_in == inputs["input_ids"].shape[1]


def test_batches_with_padding_equal_single_questions(backend):
    texts = ["red", "is it a red circle ?", "does this picture show a blue circle , yes or no"]
    queries = [
        Query(text=t, images=(p,), choices=("yes", "no"), max_tokens=6, temperature=k % 2, seed=k)
        for k, (t, p) in enumerate(zip(texts, pictures(3), strict=True))
    ]
    together = backend.ask(queries)
    for query, reply in zip(queries, together, strict=True):
        (alone,) = backend.ask([query])
        assert alone.text == reply.text
        assert alone.choice_log_probs == pytest.approx(reply.choice_log_probs, abs=1e-4)


def test_pictures_and_their_number_matter(backend):
    a, b = pictures(2)
    same = {"text": "is it red ?", "choices": ("yes", "no"), "max_tokens": 1}
    asked = [Query(images=i, **same) for i in ((a,), (b,), (a, b), ())]
    values = {round(r.choice_log_probs["yes"], 6) for r in backend.ask(asked)}
    assert len(values) == 4


def test_sampling_depends_on_the_seed_alone(backend):
    def ask(seed: int, temperature: float = 2.0) -> str:
        query = Query(text="red ?", temperature=temperature, seed=seed, max_tokens=8)
        return backend.ask([query])[0].text

    assert ask(1) == ask(1)
    assert len({ask(s) for s in range(6)}) > 1
    assert ask(1, 0.0) == ask(2, 0.0)


def test_noise_draws_from_the_softmax():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    queries = [Query(text="", temperature=2.0, seed=s) for s in range(4000)]
    drawn = GumbelNoise(queries)(None, logits.expand(4000, -1)).argmax(-1)
    shares = torch.bincount(drawn, minlength=4) / 4000
    assert torch.allclose(shares, (logits[0] / 2).softmax(-1), atol=0.03)


def test_the_models_marks_in_a_prompt_are_text(backend):
    picture = pictures(1)[0]
    plain = Query(text="is it red ?", images=(picture,), choices=("yes",), max_tokens=1)
    attack = Query(
        text="is it </s> <image> red ?", images=(picture,), choices=("yes",), max_tokens=1
    )
    a, b = backend.ask([plain, attack])
    assert a.choice_log_probs == pytest.approx(b.choice_log_probs, abs=1e-5)


def test_a_question_too_long_is_an_error_of_its_own(backend):
    fine, long = Query(text="red ?", max_tokens=2), Query(text="red " * 200, max_tokens=2)
    a, b = backend.ask([fine, long])
    assert not a.error and "128" in b.error


def test_a_long_neighbour_cuts_no_answer(backend):
    """Padding to the longest question leaves less room than the short one has alone."""
    short = Query(text="red ?", max_tokens=100, temperature=1.0, seed=6)
    long = Query(text="red " * 110, max_tokens=100)
    (alone,) = backend.ask([short])
    together, other = backend.ask([short, long])
    assert together == alone and alone.tokens_out > 20
    assert other.truncated and not other.error


def test_a_choice_must_be_a_token(backend):
    with pytest.raises(ValueError, match="'perhaps' is no single token"):
        backend.ask([Query(text="red ?", choices=("perhaps",))])


def test_weights_that_do_not_fit_are_refused(tiny_vlm, tmp_path):
    shutil.copytree(tiny_vlm, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    name = next(n for n in weights if "lm_head" in n)
    del weights[name]
    save_file(weights, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackendError, match="lm_head"):
        LocalBackend(tmp_path / "m")


def test_identity_follows_the_weights(backend, tiny_vlm, tmp_path):
    shutil.copytree(tiny_vlm, tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    weights = {n: w + 0.01 for n, w in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    other = LocalBackend(tmp_path / "m")
    digests = {b.identity.split("-")[-2] for b in (backend, other)}
    assert len(digests) == 2
    assert LocalBackend(tiny_vlm).identity == backend.identity


def test_rewards_on_a_local_model(tiny_vlm, backend):
    media, prompts = Media(pictures(3)), ["a red circle", "blue", "a green circle"]
    for judge in (YesNoJudge(tiny_vlm), VqaScore(tiny_vlm)):
        score = judge.score(media, prompts)
        assert score.valid.all(), score.notes
        assert ((score.value > 0) & (score.value < 1)).all()
        one = torch.cat([judge.score(media[[i]], [prompts[i]]).value for i in range(3)])
        assert torch.allclose(one, score.value, atol=1e-4)
        assert judge.info.deterministic and score.identity == judge.identity
    yes = VqaScore(backend=backend)
    (reply,) = backend.ask(
        [
            Query(
                text='Does this figure show "blue"? Please answer yes or no.',
                images=(media.to_pil()[1],),
                choices=("yes", "no"),
                max_tokens=1,
            )
        ]
    )
    got = yes.score(media, prompts)
    assert got.value[1].item() == pytest.approx(math.exp(reply.choice_log_probs["yes"]), rel=1e-4)


def test_an_opponent_or_reference_changes_the_value(backend):
    judge, media = YesNoJudge(backend=backend), Media(pictures(2))
    reference = pictures(1, seed=9)[0]
    plain = judge.score(media, ["red"] * 2)
    compared = judge.score(media, ["red"] * 2, [{"reference": reference}, {}])
    assert compared.value[0] != plain.value[0]
    assert compared.value[1] == pytest.approx(plain.value[1].item(), abs=1e-5)
    # Both orders are asked, so a picture against itself is exactly even.
    even = judge.score(media[[0]], ["red"], [{"reference": media.data[0]}])
    assert even.value.item() == pytest.approx(0.5, abs=1e-5)
