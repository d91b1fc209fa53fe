"""The server back-end against a real server that fails, delays, refuses and limits."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from chat_server import serving

from vision_rewards.judge.backend import Backend, BackendError, Query
from vision_rewards.judge.cache import CachedBackend
from vision_rewards.judge.server import OpenAIBackend, retry_after

PROCESS = """
import sys
from vision_rewards.judge.backend import Query
from vision_rewards.judge.cache import CachedBackend
from vision_rewards.judge.server import OpenAIBackend

cached = CachedBackend(OpenAIBackend(sys.argv[1], "tiny"), sys.argv[2])
right = True
for k in range(20):
    (reply,) = cached.ask([Query(text=f"q{k}")])
    right = right and reply.text == f"about q{k}"
print("right" if right else "wrong")
"""


def solid(color, level=0.9):
    """A picture ``(3, 32, 32)`` of one colour."""
    picture = torch.full((3, 32, 32), 0.1)
    picture[("red", "green", "blue").index(color)] = level
    return picture


def backend(chat, **options):
    """A quick client of the test server."""
    return OpenAIBackend(chat.url, "tiny", **{"backoff": 0.01, "timeout": 5.0, **options})


def test_what_is_sent(chat, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    asks = backend(chat, api_key_env="JUDGE_KEY", extra={"top_p": 0.5})
    query = Query(
        text="red?", images=(solid("red"), solid("blue")), system="be fair",
        temperature=0.3, max_tokens=7, seed=11,
    )  # fmt: skip
    (reply,) = asks.ask([query])
    (seen,) = chat.seen
    assert isinstance(asks, Backend) and reply.text == "yes"
    assert seen.headers["Authorization"] == "Bearer s3cret"
    body = {k: v for k, v in seen.body.items() if k != "messages"}
    assert body == {
        "model": "tiny", "temperature": 0.3, "max_tokens": 7, "seed": 11, "top_p": 0.5
    }  # fmt: skip
    assert [m["role"] for m in seen.body["messages"]] == ["system", "user"]
    # PNG is lossless: the server sees the pixels.
    assert seen.kinds == ["data:image/png"] * 2
    assert [i.getpixel((0, 0)) for i in seen.images] == [(230, 26, 26), (26, 26, 230)]
    assert "s3cret" not in asks.identity


def test_jpeg_is_a_recorded_setting(chat):
    png, jpeg = backend(chat), backend(chat, image_format="jpeg")
    jpeg.ask([Query(text="?", images=(solid("red"),))])
    assert chat.seen[0].kinds == ["data:image/jpeg"]
    assert png.identity != jpeg.identity


def test_many_at_once_in_order(chat):
    def slow(chat):
        time.sleep(0.05)
        return chat.text

    chat.respond = slow
    asks = backend(chat, concurrency=4)
    replies = asks.ask([Query(text=f"q{i}") for i in range(12)])
    assert [r.text for r in replies] == [f"q{i}" for i in range(12)]
    assert 2 <= chat.most <= 4
    assert vars(asks.usage) == {
        "requests": 12, "retries": 0, "failed": 0, "tokens_in": 120, "tokens_out": 36
    }  # fmt: skip


@pytest.mark.parametrize("failure", [429, 500, 503, "garbage", "no completion"])
def test_passing_failures_are_retried(chat, failure):
    answers = iter([failure, failure, "fine"])

    def flaky(_):
        answer = next(answers)
        if answer == "garbage":
            return 200, b"<html>", {}
        if answer == "no completion":
            return {"choices": []}
        return (answer, "busy", {}) if isinstance(answer, int) else answer

    chat.respond = flaky
    asks = backend(chat)
    assert asks.ask([Query(text="?")])[0].text == "fine"
    assert asks.usage.retries == 2 and asks.usage.requests == 3


def test_a_rate_limit_says_how_long_to_wait(chat):
    answers = iter([(429, "slow down", {"Retry-After": "0.3"}), "fine"])
    chat.respond = lambda _: next(answers)
    start = time.monotonic()
    assert backend(chat).ask([Query(text="?")])[0].text == "fine"
    assert time.monotonic() - start >= 0.3
    assert retry_after(None) is None and retry_after("7") == 7.0 and retry_after("soon") is None
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0


def test_waits_double_with_jitter():
    asks = OpenAIBackend("http://127.0.0.1:1/v1", "m", backoff=1.0)
    for attempt in range(3):
        waits = [asks._wait(attempt, None) for _ in range(20)]
        assert all(2**attempt / 2 <= w <= 2**attempt for w in waits) and len(set(waits)) > 1


def test_a_slow_server_times_out_and_the_others_are_answered(chat):
    gate = threading.Event()

    def hang(chat):
        if chat.text == "hang":
            gate.wait(5)
        return "fine"

    chat.respond = hang
    asks = backend(chat, timeout=0.3, retries=1)
    slow, quick = asks.ask([Query(text="hang"), Query(text="go")])
    gate.set()
    assert quick.text == "fine" and not quick.error
    assert "timed out" in slow.error.lower() and asks.usage.failed == 1


def test_nobody_there_is_an_error_of_each_question():
    asks = OpenAIBackend("http://127.0.0.1:9/v1", "m", retries=1, backoff=0.0)
    replies = asks.ask([Query(text="a"), Query(text="b")])
    assert all("refused" in r.error for r in replies) and asks.usage.requests == 4


def test_a_bad_question_fails_alone_and_at_once(chat):
    chat.respond = lambda c: (400, "too long", {}) if c.text == "long" else "fine"
    asks = backend(chat)
    long, fine = asks.ask([Query(text="long"), Query(text="short")])
    assert "too long" in long.error and fine.text == "fine" and asks.usage.requests == 2


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_no_question_can_pass_raises(chat, status):
    chat.respond = lambda _: (status, "go away", {})
    with pytest.raises(BackendError, match=rf"{status} for model 'tiny'.*not set"):
        backend(chat, api_key_env="A_KEY_NOBODY_SET").ask([Query(text="?")])


@pytest.mark.parametrize(
    "choice",
    [{"message": {"refusal": "I cannot judge this."}}, {"finish_reason": "content_filter"}],
)
def test_refusals_are_flagged(chat, choice):
    chat.respond = lambda _: chat.said(None, **choice)
    assert backend(chat).ask([Query(text="?")])[0].refused


def test_choices_are_summed_over_spellings(chat):
    top = {"Yes": math.log(0.3), " yes": math.log(0.2), "No": math.log(0.1), "maybe": math.log(0.4)}
    chat.respond = lambda _: chat.said("Yes", logprobs={"content": [chat.token("Yes", top)]})
    query = Query(text="?", choices=("yes", "no"), max_tokens=1)
    (reply,) = backend(chat).ask([query])
    assert chat.seen[0].body["logprobs"] is True and chat.seen[0].body["top_logprobs"] == 20
    assert math.exp(reply.choice_log_probs["yes"]) == pytest.approx(0.5)
    assert math.exp(reply.choice_log_probs["no"]) == pytest.approx(0.1)


def test_the_verdict_is_read_behind_the_reasoning(chat):
    tokens = [chat.token(t) for t in ("no", " cat", ".", "\n", "Answer", ":", " ")]
    tokens.append(chat.token(" no", {" no": math.log(0.75), " Yes": math.log(0.25)}))
    chat.respond = lambda _: chat.said("no cat.\nAnswer: no", logprobs={"content": tokens})
    query = Query(text="?", choices=("yes", "no"), verdict_after=r"Answer\s*:")
    (reply,) = backend(chat).ask([query])
    assert math.exp(reply.choice_log_probs["yes"]) == pytest.approx(0.25)


def test_without_either_word_there_is_no_probability(chat):
    chat.respond = lambda _: chat.said("Hm", logprobs={"content": [chat.token("Hm")]})
    query = Query(text="?", choices=("yes", "no"), max_tokens=1)
    assert backend(chat).ask([query])[0].choice_log_probs is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "localhost:8000"}, "must look like"),
        ({"base_url": "http://me:pw@localhost/v1"}, "password"),
        ({"image_format": "webp"}, "'png' or 'jpeg'"),
        ({"concurrency": 0}, "concurrency"),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(ValueError, match=message):
        OpenAIBackend(**{"base_url": "http://127.0.0.1:1/v1", "model": "m", **options})


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_the_key_follows_no_redirect(chat, monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serving() as elsewhere:
        chat.respond = lambda _: (status, "", {"Location": f"{elsewhere.url}/chat/completions"})
        with pytest.raises(BackendError, match=rf"redirects to '{elsewhere.url}"):
            backend(chat).ask([Query(text="?")])
        assert len(chat.seen) == 1 and not elsewhere.seen


def test_half_a_character_is_no_obstacle(chat, tmp_path):
    chat.respond = lambda _: chat.said("fine \ud83d")
    for _ in range(2):
        (reply,) = CachedBackend(backend(chat), tmp_path).ask([Query(text="?")])
        assert reply.text == "fine ?"
    assert len(chat.seen) == 1


class TestCache:
    """Answers on disk."""

    def test_equal_questions_are_asked_once(self, chat, tmp_path):
        top = {"yes": -0.5, "no": -1.0}
        chat.respond = lambda _: chat.said("yes", logprobs={"content": [chat.token("yes", top)]})
        query = Query(text="?", images=(solid("red"),), choices=("yes", "no"))
        first = CachedBackend(backend(chat), tmp_path)
        a, b = first.ask([query, query])
        again = CachedBackend(backend(chat), tmp_path)
        (c,) = again.ask([query])
        assert len(chat.seen) == 1
        assert a == b and (c.text, c.choice_log_probs) == (a.text, a.choice_log_probs)
        assert c.cached and c.tokens_in == 0 and (again.hits, again.misses) == (1, 0)

    @pytest.mark.parametrize(
        "change",
        [
            {"text": "!"}, {"images": (solid("red", level=0.8),)}, {"system": "s"},
            {"max_tokens": 5}, {"temperature": 1.0}, {"choices": ("yes",)},
        ],
        ids=lambda c: next(iter(c)),
    )  # fmt: skip
    def test_whatever_changes_the_answer_changes_the_key(self, chat, tmp_path, change):
        cached = CachedBackend(backend(chat), tmp_path)
        base = {"text": "?", "images": (solid("red"),)}
        cached.ask([Query(**base), Query(**(base | change))])
        assert len(chat.seen) == 2

    def test_another_model_has_other_answers(self, chat, tmp_path):
        for model in ("a", "b"):
            CachedBackend(OpenAIBackend(chat.url, model), tmp_path).ask([Query(text="?")])
        assert len(chat.seen) == 2

    def test_seeds_count_only_where_something_is_drawn(self, chat, tmp_path):
        cached = CachedBackend(backend(chat), tmp_path)
        cached.ask([Query(text="?", seed=s) for s in range(3)])
        assert len(chat.seen) == 1
        cached.ask([Query(text="?", seed=s, temperature=1.0) for s in range(3)])
        assert len(chat.seen) == 4

    def test_failures_and_refusals_are_not_kept(self, chat, tmp_path):
        chat.respond = lambda c: (
            (400, "bad", {}) if c.text == "bad" else chat.said("", finish_reason="content_filter")
        )
        cached = CachedBackend(backend(chat), tmp_path)
        for _ in range(2):
            cached.ask([Query(text="bad"), Query(text="rude")])
        assert len(chat.seen) == 4

    def test_damaged_files_are_asked_again(self, chat, tmp_path):
        cached = CachedBackend(backend(chat), tmp_path)
        cached.ask([Query(text="?")])
        (file,) = tmp_path.rglob("*.json")
        for damage in ("", "{", "[]", json.dumps({"text": 1, "what": 2})):
            file.write_text(damage)
            assert cached.ask([Query(text="?")])[0].text == "yes"
        assert len(chat.seen) == 5

    def test_threads_share_a_folder(self, chat, tmp_path):
        def ask(i):
            query = [Query(text=f"q{k % 3}") for k in range(6)]
            return [r.text for r in CachedBackend(backend(chat), tmp_path).ask(query)]

        with ThreadPoolExecutor(8) as pool:
            assert all(texts == ["yes"] * 6 for texts in pool.map(ask, range(8)))
        assert len(list(tmp_path.rglob("*.json"))) == 3
        assert not [p for p in tmp_path.rglob("*") if "partial" in p.name]

    def test_processes_share_a_folder(self, chat, tmp_path, root):
        """Several write the same entries at once; each reads what all have written."""
        chat.respond = lambda c: f"about {c.text}"
        command = [sys.executable, "-c", PROCESS, chat.url, str(tmp_path)]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        running = [
            subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE)
            for _ in range(3)
        ]
        said = [p.communicate(timeout=300)[0].split() for p in running]
        assert [p.returncode for p in running] == [0] * 3
        assert said == [["right"]] * 3 and len(list(tmp_path.rglob("*.json"))) == 20
        assert not [p for p in tmp_path.rglob("*") if "partial" in p.name]
        asked = len(chat.seen)
        late = CachedBackend(OpenAIBackend(chat.url, "tiny"), tmp_path)
        replies = late.ask([Query(text=f"q{k}") for k in range(20)])
        assert [r.text for r in replies] == [f"about q{k}" for k in range(20)]
        assert len(chat.seen) == asked and late.hits == 20
