"""The studio: runs told step by step, who may talk to it, and the page in a real browser."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
from chromium import CHROMIUM, Chromium

from mmalign.cli import main
from mmalign.commands.studio import make
from mmalign.studio.choices import choices
from mmalign.studio.jobs import Wish

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

PROMPT = "a photo of a red star"
REWARD = """import time

import numpy as np


def red(images, prompts):
    return [float(np.asarray(i)[..., 0].mean()) / 255 for i in images]


def slow(images, prompts):
    time.sleep(0.2)
    return red(images, prompts)
"""


@contextmanager
def serving():
    """The address and the key of a running studio."""
    from mmalign.studio.app import create_app

    app = create_app(make("cpu"))
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", app.state.service.key
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def studio():
    with serving() as found:
        yield found


@pytest.fixture
def client(studio):
    url, key = studio
    with httpx.Client(base_url=url, headers={"X-Studio-Key": key}, timeout=60) as client:
        yield client


@pytest.fixture
def reward(tmp_path):
    (tmp_path / "reward.py").write_text(REWARD)
    return f"{tmp_path / 'reward.py'}:red"


def wish(scorer, **more):
    known = {"prompt": PROMPT, "policy": "tiny-sd", "reward": scorer, "options": ["steps=2"]}
    return {**known, **more}


def events(client, asked):
    answer = client.post("/api/runs", json=asked)
    assert answer.status_code == 202, answer.text
    lines = client.get(f"/api/runs/{answer.json()['number']}").text.splitlines()
    return [json.loads(line) for line in lines if line]


class TestRuns:
    def test_it_is_told_step_by_step(self, client, reward):
        asked = wish(
            reward, options=["steps=2", "n=5", "batch_size=1"], held_out="jpeg_compressibility"
        )
        found = events(client, asked)
        kinds = [e["event"] for e in found]
        assert kinds[:2] == ["loading", "unsteered"] and kinds[-1] == "done"
        told = [e for e in found if e["event"] == "progress"]
        better = [e["best"] for e in told if "picture" in e]
        assert better == sorted(better) and told[-1]["total"] == 5
        plain, done = found[1], found[-1]
        assert done["score"] == max(c["score"] for c in done["candidates"]) == better[-1]
        # The first candidate is made of the noise that the unsteered picture is made of.
        assert done["candidates"][0]["picture"] == plain["picture"] == done["unsteered"]["picture"]
        assert done["candidates"][0]["score"] == pytest.approx(plain["score"], abs=1e-4)
        assert done["spent"]["nfe"] == 5 * plain["nfe"] == 20
        assert plain["held_out"] is not None and done["held_out"] is not None
        assert told[-1]["picture" if "picture" in told[-1] else "best"]

    def test_trees_and_budgets(self, client, reward):
        options = ["steps=4", "every=1", "width=1", "branch=3"]
        found = events(client, wish(reward, method="path_search", options=options, budget="nfe=20"))
        done = found[-1]
        assert done["event"] == "done" and done["story"].count("<svg") == 1
        assert done["spent"]["nfe"] <= 20

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"method": "best_of_m"}, "Did you mean 'best_of_n'"),
            ({"options": ["m=3"]}, "option of steering method"),
            ({"reward": "shapes_parti"}, "shapes_partial"),
            ({"policy": "shapes-flo"}, "shapes-flow"),
            ({"budget": "nfe=1"}, "does not allow one candidate"),
            ({"held_out": "REWARD"}, "judge results by another"),
            ({"method": "reno"}, "has none"),
        ],
    )
    def test_what_cannot_work_is_said(self, client, reward, change, said):
        change = {k: reward if v == "REWARD" else v for k, v in change.items()}
        last = events(client, wish(reward, **change))[-1]
        assert last["event"] == "failed" and said in last["message"]

    @pytest.mark.parametrize(
        ("body", "said"),
        [
            ({"prompt": " "}, "the prompt is empty"),
            ({}, "the prompt is missing"),
            ([], "JSON object"),
            ({"prompt": "a", "sed": 1}, "Did you mean 'seed'"),
            ({"prompt": "a", "seed": "1"}, "seed has the wrong type"),
            ({"prompt": "a", "options": "n=1"}, "options has the wrong type"),
        ],
    )
    def test_odd_requests(self, client, body, said):
        answer = client.post("/api/runs", json=body)
        assert answer.status_code == 422 and said in answer.json()["message"]

    def test_stopping(self, client, reward):
        options = ["steps=2", "n=200", "batch_size=1"]
        asked = wish(reward.replace(":red", ":slow"), options=options)
        number = client.post("/api/runs", json=asked).json()["number"]
        kinds = []
        with client.stream("GET", f"/api/runs/{number}") as answer:
            for line in filter(None, answer.iter_lines()):
                kinds.append(json.loads(line)["event"])
                if kinds.count("progress") == 2:
                    client.post(f"/api/runs/{number}/stop")
        assert kinds[-1] == "stopped" and kinds.count("progress") < 20

    def test_there_is_no_such_run(self, client):
        assert client.get("/api/runs/999").status_code == 404
        assert client.post("/api/runs/999/stop").status_code == 404


class TestWhoMayTalk:
    def test_the_key_is_asked_for(self, studio):
        url, _ = studio
        for path in ("/api/choices", "/api/runs/1"):
            assert httpx.get(f"{url}{path}").status_code == 403
        answer = httpx.post(f"{url}/api/runs", json=wish("jpeg_compressibility"))
        assert answer.status_code == 403 and "load the page again" in answer.json()["message"]

    def test_other_names_of_this_machine_are_refused(self, studio):
        url, key = studio
        port = int(url.rpartition(":")[2])
        for name, status in (("evil.example", 403), (f"localhost:{port}", 200), ("[::1]:9", 200)):
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("GET", "/", headers={"Host": name, "X-Studio-Key": key})
            answer = connection.getresponse()
            text = answer.read().decode()
            assert answer.status == status and (key in text) is (status == 200), name
            connection.close()

    def test_the_page_may_fetch_from_here_only(self, client):
        answer = client.get("/")
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy
        assert "http" not in answer.text.replace("http-equiv", "")
        assert client.get("/page.html").status_code == 404

    @pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.7", "example.org"])
    def test_it_listens_on_this_machine_only(self, host, capsys):
        assert main(["studio", "--host", host]) == 2
        error = capsys.readouterr().err
        assert "listens on this machine only" in error and "ssh -L" in error


def test_every_method_and_its_options_are_offered():
    offered = choices()
    methods = {m["name"]: m for m in offered["methods"]}
    assert {"best_of_n", "zero_order", "path_search", "refine"} <= set(methods)
    options = {o["name"]: o for o in methods["zero_order"]["options"]}
    assert options["cosine"]["default"] == 0.95 and "pivot" in options["cosine"]["help"]
    assert "seed" not in options and list(options)[-1] in ("dtype", "guidance_scale")
    names = {r["name"] for r in offered["rewards"]}
    assert "shapes_partial" in names and "pairwise_judge" not in names
    with pytest.raises(ValueError, match="prompt is empty"):
        Wish(prompt="")


def text(page, selector):
    return page.js(f"document.querySelector('{selector}').textContent")


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_person_steers_in_a_browser(studio, reward, tmp_path):
    """Type, click, watch the best picture improve, compare; then a mistake and a stop."""
    url, _ = studio
    with Chromium(tmp_path) as browser:
        page = browser.tab(1280, 1500)
        page.open(url)
        page.until("document.body.dataset.ready")
        assert page.js("document.querySelectorAll('#method option').length") > 4
        for field, said in (("prompt", PROMPT), ("policy", "tiny-sd"), ("reward", reward),
                            ("held_out", "jpeg_compressibility")):  # fmt: skip
            page.fill(f"#{field}", said)
        page.js("document.querySelector('details').open = true")
        for option, said in (("n", "12"), ("steps", "2"), ("batch_size", "1")):
            page.fill(f"[data-option={option}]", said)
        page.click("#go")
        page.until("document.body.dataset.event === 'done'")
        plain, best = (
            page.js(f"document.querySelector('#{which} img').naturalWidth")
            for which in ("plain", "best")
        )
        assert plain == best == 32
        assert page.js("document.querySelector('#curve .line').getBoundingClientRect().width") > 50
        scores = [float(text(page, f"#{which} output")) for which in ("plain", "best")]
        assert scores[1] > scores[0] and "Done" in text(page, "#status")
        assert page.js("document.querySelectorAll('#others img').length") == 12
        assert page.js("document.querySelectorAll('#others .chosen').length") == 1
        assert "judged" in text(page, "#best small")
        assert page.js("[...document.images].every(i => i.naturalWidth > 0)")
        assert page.js("document.documentElement.scrollWidth <= innerWidth")
        page.shot(tmp_path / "studio.png", whole=True)

        page.fill("#reward", "shapes_parti")
        page.click("#go")
        page.until("document.body.dataset.event === 'failed'")
        assert "shapes_partial" in text(page, "#status.bad")

        page.fill("#reward", reward.replace(":red", ":slow"))
        page.fill("[data-option=n]", "500")
        page.click("#go")
        page.until("document.body.dataset.event === 'progress'")
        page.click("#stop")
        page.until("document.body.dataset.event === 'stopped'")
        assert page.until("!document.querySelector('#go').disabled")
        assert page.js("document.querySelectorAll('#history figure').length") == 1
        assert not page.errors(), page.errors()
        assert all(r.startswith((url, "data:", "about:")) for r in page.requests()), page.requests()
