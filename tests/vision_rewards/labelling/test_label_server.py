"""The server over real sockets: who is let in, what comes back, two tabs, a full disk."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from typing import Any

import httpx
import pytest
from label_server import TOKEN

from vision_rewards.labelling import server as label_server
from vision_rewards.labelling.server import Access, host_name
from vision_rewards.serving.safety import ServerSettingsError

AUTH = {"Authorization": f"Bearer {TOKEN}"}


def state(server: Any, user: str = "ann") -> dict[str, Any]:
    response = httpx.get(f"{server.url}/api/state", params={"user": user}, headers=AUTH)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def post(server: Any, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/api/{path}", json=body, headers=AUTH)


def decide(server: Any, user: str, choice: str) -> dict[str, Any]:
    task = state(server, user)["task"]["id"]
    answer: dict[str, Any] = post(server, "decide", user=user, task=task, choice=choice).json()
    return answer


def test_labelling_from_first_to_last(serve):
    server = serve(4, repeat=0.5)
    first = state(server)
    assert (first["done"], first["total"], first["last"], first["pace"]) == (0, 6, None, None)
    assert len(first["ahead"]) == 4  # the pictures of two further pairs
    answer = decide(server, "ann", "left")
    assert answer["recorded"] and answer["done"] == 1 and answer["last"]["choice"] == "left"
    undone = post(server, "undo", user="ann", task=answer["last"]["task"]).json()
    assert undone["recorded"] and undone["task"] == first["task"] and undone["last"] is None
    for _ in range(6):
        answer = decide(server, "ann", "right")
    assert (answer["task"], answer["done"], answer["ahead"]) == (None, 6, [])
    rows = [json.loads(line) for line in server.path.read_text().splitlines()]
    assert [row["label"] for row in rows[:2]].count("undo") == 1 and len(rows) == 8
    found = httpx.get(f"{server.url}/api/agreement", headers=AUTH).json()
    assert found["annotators"][0]["self"]["n"] == 2 and found["annotators"][0]["undone"] == 1


def test_annotators_have_their_own_order_and_progress(serve):
    server = serve(6)
    decide(server, "ann", "tie")
    assert state(server, "ann")["done"] == 1 and state(server, "bob")["done"] == 0
    tasks = {u: [decide(server, u, "skip")["last"]["task"][:16] for _ in range(5)] for u in "xy"}
    assert tasks["x"] != tasks["y"]


def test_two_tabs_count_once(serve):
    server = serve(3)
    task = state(server)["task"]["id"]  # both tabs show it
    one = post(server, "decide", user="ann", task=task, choice="left", seconds=1).json()
    two = post(server, "decide", user="ann", task=task, choice="right", seconds=2).json()
    assert (one["recorded"], two["recorded"]) == (True, False)
    assert one["task"] == two["task"] and two["last"]["choice"] == "left"
    assert len(server.path.read_text().splitlines()) == 1
    again = [post(server, "undo", user="ann", task=task).json() for _ in range(2)]
    assert [a["recorded"] for a in again] == [True, False]


def test_pictures_are_served_by_number_only(serve, tmp_path):
    server = serve(2)
    (tmp_path / "secret.png").write_bytes(b"secret")
    task = state(server)["task"]
    got = httpx.get(f"{server.url}/api/image/{task['left']}", headers=AUTH)
    assert got.headers["content-type"] == "image/png"
    assert got.content in {p.read_bytes() for p in tmp_path.glob("[0-9]?.png")}
    for path in (
        "99",
        "-1",
        "../secret.png",
        "..%2f..%2fsecret.png",
        "%2e%2e/secret.png",
        "0/../..",
    ):
        got = httpx.get(f"{server.url}/api/image/{path}", headers=AUTH)
        assert got.status_code == 404 and b"secret" not in got.content
    for path in ("labels.jsonl", "static/page.html", "docs", "openapi.json", "api/"):
        assert httpx.get(f"{server.url}/{path}", headers=AUTH).status_code == 404


@pytest.mark.parametrize("path", ["state?user=ann", "agreement", "image/0"])
def test_nothing_is_told_without_the_token(serve, path):
    server = serve(2)
    for headers in ({}, {"Authorization": "Bearer wrong-token"}, {"Authorization": "é"}):
        sent = {k: v.encode("latin-1") for k, v in headers.items()}
        got = httpx.get(f"{server.url}/api/{path}", headers=sent)
        assert got.status_code == 401 and "link" in got.json()["error"]
    assert httpx.get(f"{server.url}/api/{path}&token={TOKEN}").status_code != 200
    page = httpx.get(f"{server.url}/")  # the page itself holds no data
    assert page.status_code == 200 and TOKEN not in page.text


def test_names_of_other_sites_are_refused(serve):
    server = serve(2, access=Access(token=TOKEN, names=("lab.example",)))
    for host, status in (
        ("127.0.0.1", 200), ("localhost:9000", 200), ("[::1]:80", 200), ("LAB.example:8124", 200),
        ("evil.example", 421), ("localhost.evil.example", 421), ("192.0.2.7", 421), ("", 421),
    ):  # fmt: skip
        for path in ("/", "/api/state?user=ann"):
            headers = {**AUTH, "Host": host}
            assert httpx.get(server.url + path, headers=headers).status_code == status, host


def test_hosts_of_a_server_that_others_can_reach():
    access = Access(host="0.0.0.0", token="long-enough")
    for host in ("192.0.2.7:8124", "[2001:db8::1]", "localhost"):
        assert access.admits(host)
    assert not access.admits("evil.example") and not access.admits(None)
    assert access.link(8124, "Ann Lee").endswith(":8124/#token=long-enough&annotator=Ann%20Lee")
    assert Access(host="::1", token=None).link(1) == "http://[::1]:1/"
    assert host_name("[::1]:80") == "::1" and host_name("A.b:1") == "a.b"


def test_no_server_for_others_without_a_token():
    with pytest.raises(ServerSettingsError, match="reachable from other machines"):
        Access(host="0.0.0.0", token=None)
    for token in ("short", "with a space in", "ümlaut-ümlaut", "new\nline\nnew"):
        with pytest.raises(ServerSettingsError, match="token must be"):
            Access(token=token)
    drawn = {Access().token for _ in range(3)}
    assert len(drawn) == 3 and min(map(len, filter(None, drawn))) >= 32
    assert "token" not in repr(Access())


def test_without_a_token_other_sites_can_still_not_write(serve):
    server = serve(2, access=Access(token=None))
    task = httpx.get(f"{server.url}/api/state?user=ann").json()["task"]["id"]
    body = json.dumps({"user": "ann", "task": task, "choice": "left"})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        headers = {"Content-Type": kind, "Origin": "http://evil.example"}
        got = httpx.post(f"{server.url}/api/decide", content=body, headers=headers)
        assert got.status_code == 415  # what a page may send elsewhere without asking first
    asked = httpx.options(f"{server.url}/api/decide", headers={"Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in asked.headers
    assert server.path.read_text() == ""


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "not JSON"),
        (b"[1]", 400, "must be a JSON object"),
        (b'{"user": "", "task": "x", "choice": "left"}', 400, "annotator is ''"),
        (b'{"user": "ann", "task": "x", "choice": "left"}', 400, "no task 'x'"),
        (b'{"user": "ann", "task": "x", "choice": "a"}', 400, "choice is 'a'"),
        (b'{"user": "' + b"x" * 20_000 + b'"}', 413, "longer than"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(serve, body, status, message):
    server = serve(2)
    headers = {**AUTH, "Content-Type": "application/json"}
    got = httpx.post(f"{server.url}/api/decide", content=body, headers=headers)
    assert got.status_code == status and message in got.json()["error"]


def test_a_decision_that_cannot_be_written_is_refused(serve):
    resource, signal = pytest.importorskip("resource"), pytest.importorskip("signal")
    server = serve(2)
    task = state(server)["task"]["id"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        got = post(server, "decide", user="ann", task=task, choice="left")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert got.status_code == 507 and "does not count" in got.json()["error"]
    assert state(server)["done"] == 0 and server.path.read_text() == ""
    assert post(server, "decide", user="ann", task=task, choice="left").json()["recorded"]


def test_a_picture_that_went_away(serve, tmp_path):
    server = serve(2)
    task = state(server)["task"]
    for path in tmp_path.glob("[0-9]?.png"):
        path.unlink()
    got = httpx.get(f"{server.url}/api/image/{task['left']}", headers=AUTH)
    assert got.status_code == 404 and "FileNotFoundError" in got.json()["error"]


def test_the_page_loads_nothing_from_elsewhere(serve):
    text = files(label_server.__package__).joinpath("page.html").read_text("utf-8")
    assert not re.findall(r"https?://|//[a-z]+\.|@import|url\(", text)
    assert re.findall(r'(?:src|href)="([^"]*)"', text) == ["data:,", "agreement"]
    assert "style=" not in text and " on" + "click" not in text  # the policy would refuse them
    page = httpx.get(f"{serve(2).url}/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert policy.count("'sha256-") == 2
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["cache-control"] == "no-store"
