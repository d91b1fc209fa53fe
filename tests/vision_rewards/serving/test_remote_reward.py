"""The client: the scores of the same reward here, whatever happens on the way."""

from __future__ import annotations

import socket
import threading
import time
from functools import partial

import pytest
import torch

from mmalign.protocols import RewardModel
from mmalign.scoring import score_pictures
from mmalign.types import Media
from vision_rewards.compositions.groups import Pareto
from vision_rewards.factory import load_reward
from vision_rewards.function import FunctionReward
from vision_rewards.guard import GuardedReward, RewardFailedError, RewardUnavailableError
from vision_rewards.serving.client import RemoteReward
from vision_rewards.serving.replicas import ImpossibleCallError, RemoteRewardError, parse_addresses
from vision_rewards.serving.safety import Limits


def assert_same(got, wanted) -> None:
    """Equal to the bit, in everything."""
    assert torch.equal(got.value.view(torch.int32), wanted.value.view(torch.int32))
    assert got.valid.equal(wanted.valid) and list(got.parts) == list(wanted.parts)
    for name, part in wanted.parts.items():
        assert torch.equal(got.parts[name].view(torch.int32), part.view(torch.int32)), name
    assert got.notes == wanted.notes and got.identity == wanted.identity


def unused_url() -> str:
    """An address nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_scores_are_bit_identical_to_local_ones(serve, kit):
    local = load_reward("shapes_partial")
    remote = load_reward(f"remote:{serve(local).url}")
    assert isinstance(remote, RemoteReward) and isinstance(remote, RewardModel)
    assert remote.info == local.info and remote.identity == local.identity
    for media, prompts in (
        (kit.scenes, kit.captions),
        (kit.scenes, kit.captions[::-1]),
        (kit.noise, kit.captions),
    ):
        assert_same(remote.score(media, prompts), local.score(media, prompts))
    assert len(remote.score(kit.scenes[:0], [])) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_float_scores_are_bit_identical(serve, kit, dtype):
    remote = RemoteReward(serve(kit.contrast).url)
    for media in (
        Media((kit.noise.data * 1.3 - 0.1).to(dtype)),
        kit.scenes,
        Media(kit.noise.data[:4].unflatten(0, (2, 2)).to(dtype)),
        Media(torch.rand(2, 5, 3, 1)),
    ):
        prompts = [""] * len(media)
        assert_same(remote.score(media, prompts), kit.contrast.score(media, prompts))


def test_a_composition_keeps_its_parts_and_weights(serve, kit):
    local = load_reward({"shapes_partial": 1.0, "jpeg_compressibility": 0.01})
    remote = RemoteReward(serve(local).url)
    assert remote.weights == local.weights
    assert_same(remote.score(kit.scenes, kit.captions), local.score(kit.scenes, kit.captions))


def test_a_reward_of_whole_batches_is_one_over_there_too(serve, kit):
    """Fronts of a batch are not those of its prompts: scoring must not part the batch."""
    parts = {"a": (kit.contrast, 1.0), "b": (load_reward("jpeg_compressibility"), 1.0)}
    for within, fits in (("prompt", True), ("batch", False)):
        local = Pareto(parts, within=within)
        remote = RemoteReward(serve(local).url)
        assert remote.whole_batch == GuardedReward(remote).whole_batch == (within == "batch")
        for reward in (local, remote):
            call = partial(score_pictures, reward, kit.noise, list("abcde"), batch_size=2)
            if fits:
                assert call().value.tolist() == [1.0] * 5
            else:
                with pytest.raises(ValueError, match="5 pictures of all prompts"):
                    call()


def test_gradients_are_declared_not_to_flow(serve):
    local = FunctionReward(lambda m, p: m.flatten(1).mean(1), takes="tensor", differentiable=True)
    remote = RemoteReward(serve(local).url)
    assert local.info.differentiable and not remote.info.differentiable
    pixels = torch.rand(2, 3, 4, 4, requires_grad=True)
    got = remote.score(Media(pixels), ["", ""])
    assert not got.value.requires_grad and got.value.equal(pixels.mean((1, 2, 3)).detach())


def test_context_and_unscored_samples_arrive(serve):
    def closeness(media, prompts, context):
        close = [float(c["reference"].sum()) if c["scored"] else None for c in context]
        return close

    local = FunctionReward(closeness, takes="tensor")
    remote = RemoteReward(serve(local).url)
    media = Media(torch.rand(2, 3, 4, 4))
    context = [{"reference": torch.rand(3, 4, 4), "scored": k == 0} for k in range(2)]
    got = remote.score(media, ["", ""], context)
    assert got.valid.tolist() == [True, False] and got.notes[1]
    assert_same(got, local.score(media, ["", ""], context))


def test_png_is_another_reward(serve, kit):
    server = serve(kit.contrast)
    rounded = RemoteReward(server.url, transport="png")
    assert rounded.identity == kit.contrast.identity + "+png8"
    got = rounded.score(kit.noise, [""] * 5)
    eight = Media((kit.noise.data * 255).round() / 255)
    assert got.value.equal(kit.contrast.score(eight, [""] * 5).value)
    assert got.identity == rounded.identity


def test_large_batches_are_cut_to_the_servers_limits(serve, kit):
    seen: list[int] = []

    def widths(images, prompts):
        seen.append(len(images))
        return [float(p) for p in prompts]

    for limits in (Limits(max_images=2), Limits(max_pixels=600), Limits(max_bytes=14_000)):
        seen.clear()
        remote = RemoteReward(serve(FunctionReward(widths), limits=limits).url)
        assert remote.score(kit.noise, list("12345")).value.tolist() == [1, 2, 3, 4, 5]
        assert sorted(seen) == [1, 2, 2]


def test_replicas_share_the_work(serve, kit):
    seen: dict[int, int] = {}

    def build(k: int):
        reward = FunctionReward(lambda m, p: m.flatten(1).sum(1), name="sum", takes="tensor")
        reward._identity = "sum@1"
        score = reward.score

        def counted(media, prompts, context=None):
            seen[k] = seen.get(k, 0) + len(media)
            return score(media, prompts, context)

        reward.score = counted
        return serve(reward).url

    remote = load_reward(f"remote:{build(0)},{build(1)}")
    wanted = kit.noise.data.flatten(1).sum(1)
    assert remote.score(kit.noise, [""] * 5).value.equal(wanted)
    assert seen == {0: 3, 1: 2}


def test_a_replica_that_is_gone_is_stood_in_for(serve, kit, capfd):
    gone = unused_url()
    remote = RemoteReward([gone, serve(kit.contrast).url], wait=5)
    assert_same(remote.score(kit.noise, [""] * 5), kit.contrast.score(kit.noise, [""] * 5))
    said = capfd.readouterr().err
    assert said.count(gone) == 1 and "trying again for up to 5 s" in said


def test_replicas_of_different_rewards_are_refused(serve, kit):
    urls = [serve(kit.contrast).url, serve(load_reward("jpeg_compressibility")).url]
    with pytest.raises(ValueError, match=r"reward servers differ: .*contrast@.*jpeg"):
        RemoteReward(urls)


def test_a_server_that_comes_back_as_another_is_refused(serve, kit):
    server = serve(kit.contrast)
    remote = RemoteReward(server.url)
    server.service.worker.reward = load_reward("jpeg_compressibility")
    with pytest.raises(RewardUnavailableError, match=r"now serves 'jpeg.* not 'contrast"):
        remote.score(kit.noise, [""] * 5)


def test_a_lost_server_passes_every_guard(kit):
    with kit.running(kit.contrast) as server:
        remote = RemoteReward(server.url, wait=0.6)
    guarded = GuardedReward(GuardedReward(remote, max_failed_share=1.0), max_failed_share=1.0)
    start = time.monotonic()
    with pytest.raises(RewardUnavailableError, match="no reward server answered") as lost:
        guarded.score(kit.noise, [""] * 5)
    assert 0.6 <= time.monotonic() - start < 5
    assert f"for 0.6 s: {server.url}" in str(lost.value)
    assert isinstance(lost.value, RewardFailedError)
    assert guarded.unscored == 0


def test_a_server_that_returns_in_time_is_waited_for(kit, capfd):
    from mmalign.runtime.listening import listen

    with kit.running(kit.contrast) as server:
        remote = RemoteReward(server.url, wait=20)
    listener = listen("127.0.0.1", server.port)  # accepts connections and answers none ...
    threading.Timer(0.3, listener.close).start()  # ... and then is gone

    def revive() -> None:
        time.sleep(0.8)
        import uvicorn

        from vision_rewards.serving.app import create_app

        again = uvicorn.Config(create_app(kit.contrast), port=server.port, log_level="error")
        second.append(uvicorn.Server(again))
        second[0].run()

    second: list = []
    thread = threading.Thread(target=revive)
    thread.start()
    try:
        got = remote.score(kit.noise, [""] * 5)
    finally:
        while not second or not second[0].started:
            time.sleep(0.01)
        second[0].should_exit = True
        thread.join(10)
    assert_same(got, kit.contrast.score(kit.noise, [""] * 5))
    said = capfd.readouterr().err
    assert said.count("trying again") == 1 and said.count("answers again") == 1


def test_what_the_reward_raises_is_a_failed_score_not_a_lost_server(serve, kit):
    def broken(images, prompts):
        raise ArithmeticError("division by zero")

    remote = RemoteReward(serve(FunctionReward(broken)).url)
    with pytest.raises(RemoteRewardError, match="ArithmeticError: division by zero"):
        remote.score(kit.noise, [""] * 5)
    score = GuardedReward(remote, max_failed_share=1.0).score(kit.noise, [""] * 5)
    assert not score.valid.any() and "division by zero" in score.notes[0]


def test_impossible_calls_are_the_callers_mistake(serve, kit):
    remote = RemoteReward(serve(load_reward("jpeg_compressibility")).url)
    with pytest.raises(ValueError, match="takes image, got a video"):
        remote.score(Media(torch.zeros(1, 2, 3, 4, 4)), [""])
    with pytest.raises(ValueError, match="2 prompts"):
        remote.score(kit.noise, ["", ""])
    small = RemoteReward(serve(kit.contrast, limits=Limits(max_pixels=100)).url)
    with pytest.raises(ImpossibleCallError, match="at most 100"):
        small.score(kit.noise, [""] * 5)


def test_token(serve, kit, monkeypatch):
    url = serve(kit.contrast, token="secret").url
    monkeypatch.delenv("MMALIGN_REWARD_TOKEN", raising=False)
    with pytest.raises(RewardUnavailableError, match=f"{url}: this server asks for a token"):
        RemoteReward(url)
    assert RemoteReward(url, token="secret").identity == kit.contrast.identity
    monkeypatch.setenv("MMALIGN_REWARD_TOKEN", "secret")
    assert RemoteReward(url).score(kit.noise, [""] * 5).valid.all()


def test_slow_servers_run_into_the_timeout(serve, kit):
    go = threading.Event()
    reward = FunctionReward(lambda images, prompts: [float(go.wait(10))] * len(images))
    remote = RemoteReward(serve(reward).url, timeout=0.2, wait=0)
    try:
        with pytest.raises(RewardUnavailableError, match="ReadTimeout"):
            remote.score(kit.noise, [""] * 5)
    finally:
        go.set()


def test_addresses_and_options():
    assert parse_addresses("http://a:1/, https://b/x") == ["http://a:1", "https://b/x"]
    for bad in ("", "a:1", "ftp://a", "http://", "http://a,http://a/", "http://a?wait=1"):
        with pytest.raises(ValueError, match=r"reward server|named twice"):
            parse_addresses(bad)
    with pytest.raises(ValueError, match="token into the environment"):
        parse_addresses("http://me:secret@a")
    with pytest.raises(ValueError, match="transport is 'pickle'"):
        RemoteReward("http://a", transport="pickle")
    with pytest.raises(ValueError, match="timeout 0"):
        RemoteReward("http://a", timeout=0)
    with pytest.raises(RewardUnavailableError, match="no reward server answered for 0 s"):
        RemoteReward(unused_url(), wait=0)


def test_another_kind_of_server_is_recognised():
    import http.server

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, *args) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(RewardUnavailableError, match="is no mmalign reward server"):
            RemoteReward(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
