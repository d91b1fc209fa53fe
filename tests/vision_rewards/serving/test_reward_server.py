"""The server over real sockets, and as a process of its own."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

from mmalign.cli import main
from mmalign.types import Media
from vision_rewards.factory import load_reward
from vision_rewards.function import FunctionReward
from vision_rewards.serving import wire
from vision_rewards.serving.safety import Limits, ServerSettings, ServerSettingsError
from vision_rewards.serving.server import serve as run_server

HEADERS = {"Content-Type": wire.TENSORS}


def body(media: Media, prompts=None) -> bytes:
    return wire.encode_call(wire.Call(media, tuple(prompts or [""] * len(media))))


def error(response: httpx.Response) -> tuple[int, str, str]:
    content = response.json()["error"]
    return response.status_code, content["code"], content["message"]


def test_json_as_a_shell_would_send_it(serve, kit):
    url = serve(load_reward("shapes_partial")).url
    images = []
    for image in kit.scenes.to_pil():
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        images.append(base64.b64encode(buffer.getvalue()).decode())
    got = httpx.post(f"{url}/score", json={"images": images, "prompts": kit.captions}).json()
    wanted = load_reward("shapes_partial").score(kit.scenes, kit.captions)
    assert got["value"] == wanted.value.tolist() and got["valid"] == [True] * 5
    assert got["identity"] == wanted.identity
    assert got["parts"] == {n: p.tolist() for n, p in wanted.parts.items()}


def test_health_identity_and_metrics(serve, kit):
    reward = FunctionReward(lambda images, prompts: [None, *[1.0] * (len(images) - 1)])
    url = serve(reward, limits=Limits(max_images=7)).url
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    said = httpx.get(f"{url}/identity").json()
    assert said["identity"] == reward.identity and said["info"]["name"] == reward.info.name
    assert said["limits"]["max_images"] == 7 and said["versions"]["torch"]
    for _ in range(2):
        assert httpx.post(f"{url}/score", content=body(kit.scenes), headers=HEADERS).is_success
    assert httpx.post(f"{url}/score", content=b"", headers=HEADERS).status_code == 400
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    for line in (
        'requests_total{status="200"} 2',
        'requests_total{status="400"} 1',
        "samples_total 10",
        "unscored_total 2",
        "waiting_requests 0",
        'request_seconds_bucket{le="+Inf"} 3',
        "request_seconds_count 3",
    ):
        assert f"mmalign_reward_{line}" in lines
    for line in lines:  # the exposition format: comments, or a name, labels and a number
        assert re.match(r'^(# (HELP|TYPE) \w+ .+|\w+(\{(\w+="[^"\n]*",?)+\})? [-+.e\d]+)$', line)


def test_a_token_is_asked_for(serve, kit):
    url = serve(load_reward("shapes_partial"), token="secret").url
    content = body(kit.scenes, kit.captions)
    for wrong in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "secret"}):
        got = httpx.post(f"{url}/score", content=content, headers={**HEADERS, **wrong})
        assert error(got)[:2] == (401, "token") and got.headers["WWW-Authenticate"] == "Bearer"
        assert all(
            httpx.get(f"{url}/{page}", headers=wrong).status_code == 401
            for page in ("identity", "metrics")
        )
    assert httpx.get(f"{url}/health").status_code == 200
    right = {**HEADERS, "Authorization": "Bearer secret"}
    assert httpx.post(f"{url}/score", content=content, headers=right).status_code == 200
    assert all(httpx.get(f"{url}/{page}").status_code == 404 for page in ("docs", "openapi.json"))


def test_bodies_beyond_the_limit_are_not_read(serve):
    server = serve(load_reward("jpeg_compressibility"), limits=Limits(max_bytes=1000))
    got = httpx.post(f"{server.url}/score", content=b"x" * 1001, headers=HEADERS)
    assert error(got)[:2] == (413, "too_large")
    # A declared gigabyte, of which nothing is sent: the answer comes at once.
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(
            b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-safetensors\r\n"
            b"Content-Length: 1000000000\r\n\r\n"
        )
        assert b"413" in raw.recv(100)
    # No declared length at all: cut off as soon as it is too long.
    got = httpx.post(f"{server.url}/score", content=(b"x" * 400 for _ in range(5)), headers=HEADERS)
    assert error(got)[:2] == (413, "too_large")


def test_requests_that_cannot_be_answered_are_told_why(serve, kit):
    url = serve(load_reward("jpeg_compressibility"), limits=Limits(max_pixels=2000)).url

    def post(content: bytes, **headers: str) -> tuple[int, str, str]:
        return error(httpx.post(f"{url}/score", content=content, headers={**HEADERS, **headers}))

    video = Media(torch.zeros(1, 2, 3, 4, 4))
    status, code, message = post(body(video))
    assert (status, code) == (422, "impossible_call") and "takes image, got a video" in message
    assert post(body(kit.scenes))[:2] == (413, "too_large")
    assert post(b"", **{"Content-Type": "text/plain"})[:2] == (415, "content_type")
    assert post(b"", **{"Content-Encoding": "gzip"})[:2] == (415, "content_type")
    assert post(b"junk")[:2] == (400, "bad_request")


def test_what_the_reward_raises_is_told(serve, kit):
    def broken(images, prompts):
        raise ArithmeticError("division by zero")

    url = serve(FunctionReward(broken)).url
    got = httpx.post(f"{url}/score", content=body(kit.noise), headers=HEADERS)
    assert error(got) == (500, "reward_failed", "ArithmeticError: division by zero")


def test_many_callers_at_once_get_their_own_scores(serve, kit):
    server = serve(kit.contrast)

    def ask(k: int) -> bool:
        media = Media(kit.noise.data[k % 5 : k % 5 + 1] / (1 + k))
        reply = httpx.post(f"{server.url}/score", content=body(media), headers=HEADERS)
        got = wire.decode_score(reply.content, wire.TENSORS)
        return torch.allclose(got.value, kit.contrast.score(media, [""]).value)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(24)))


def test_a_full_queue_sends_callers_away(serve, kit):
    go, began = threading.Event(), threading.Event()

    def slow(images, prompts):
        began.set()
        assert go.wait(20)
        return [0.0] * len(images)

    url = serve(FunctionReward(slow), max_waiting=1).url
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(httpx.post, f"{url}/score", content=body(kit.noise), headers=HEADERS)
        assert began.wait(20)
        try:
            second = httpx.post(f"{url}/score", content=body(kit.noise), headers=HEADERS)
        finally:
            go.set()
        assert error(second)[:2] == (503, "busy") and second.headers["Retry-After"]
        assert first.result(20).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org"])
def test_others_are_not_let_in_without_a_token(host, capsys, monkeypatch):
    monkeypatch.delenv("MMALIGN_REWARD_TOKEN", raising=False)
    with pytest.raises(ServerSettingsError, match="reachable from other machines"):
        run_server(load_reward("shapes_partial"), ServerSettings(), host=host)
    assert main(["serve-reward", "shapes_partial", "--host", host]) == 2
    assert "there is no token" in capsys.readouterr().err


def test_bad_settings_are_refused(capsys, monkeypatch):
    monkeypatch.delenv("NO_SUCH", raising=False)
    assert main(["serve-reward", "shapes_partial", "--token-env", "NO_SUCH"]) == 2
    assert "NO_SUCH, which is not set" in capsys.readouterr().err
    assert main(["serve-reward", "shapes_partial", "--max-pixels", "0"]) == 2
    assert "max_pixels is 0" in capsys.readouterr().err
    assert main(["serve-reward", "shapes_partail"]) == 2
    assert "shapes_partial" in capsys.readouterr().err
    for settings, words in (({"batch": 0}, "batch is 0"), ({"token": "ä"}, "ASCII")):
        with pytest.raises(ServerSettingsError, match=words):
            ServerSettings(**settings)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve-reward", "jpeg_compressibility", "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


SLOW = """
import sys, time
def slow(images, prompts):
    print("scoring", file=sys.stderr, flush=True)
    time.sleep(0.5)
    return [float(i.width) for i in images]
"""


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_process_finishes_what_it_began(stop, root, tmp_path, kit):
    (tmp_path / "slow.py").write_text(SLOW)
    command = [sys.executable, "-m", "mmalign", "serve-reward", "slow.py:slow", "--port", "0"]
    env = {**os.environ, "PYTHONPATH": str(root), "TOKEN": "secret", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--token-env", "TOKEN"], env=env, cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        url = re.fullmatch(r"serving slow@\S+ at (http://127\.0\.0\.1:\d+)\n", line)[1]
        headers = {**HEADERS, "Authorization": "Bearer secret"}
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(
                httpx.post, f"{url}/score", content=body(kit.noise), headers=headers, timeout=20
            )
            assert process.stderr.readline() == "scoring\n"
            process.send_signal(stop)
            score = wire.decode_score(asked.result(20).content, wire.TENSORS)
        assert score.value.tolist() == [16.0] * 5
        assert process.wait(20) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


def test_json_answers_hold_null_where_nothing_was_scored(serve, kit):
    url = serve(FunctionReward(lambda images, prompts: [None, 1.0])).url
    images = json.loads(wire.encode_call(wire.Call(kit.noise[:2], ("", "")), wire.JSON))["images"]
    got = httpx.post(f"{url}/score", json={"images": images, "prompts": ["", ""]}).json()
    assert got["value"] == [None, 1.0] and got["valid"] == [False, True] and got["notes"][0]
