"""Fetching official files: resumption, digests, refusals, against a local server."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from file_server import Files, serve_files

from eval.benchmarks.sources import COMPLETE, SOURCES, cached, data_root, get
from mmalign.cli import main
from mmalign.registry import UnknownNameError
from mmalign.runtime.download import DownloadError, fetch

BODY = bytes(range(256)) * 400
DIGEST = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server() -> Iterator[Files]:
    with serve_files({"/a.bin": BODY}) as files:
        yield files


def test_a_file_is_fetched_once_and_then_needs_no_network(server: Files, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.bin"
    assert fetch(f"{server.url}/a.bin", path, DIGEST) == DIGEST
    assert path.read_bytes() == BODY
    assert fetch("http://127.0.0.1:9/gone", path, DIGEST) == DIGEST
    assert len(server.asked) == 1


def test_a_broken_connection_is_resumed_where_it_broke(server: Files, tmp_path: Path) -> None:
    server.cut["/a.bin"] = [1000, 2000]
    fetch(f"{server.url}/a.bin", tmp_path / "a.bin", DIGEST, pause=0.0)
    assert (tmp_path / "a.bin").read_bytes() == BODY
    assert [r for _, r in server.asked] == [None, "bytes=1000-", "bytes=3000-"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_what_arrived_is_kept_for_the_next_call(server: Files, tmp_path: Path) -> None:
    server.cut["/a.bin"] = [1000, 500]
    with pytest.raises(DownloadError, match=r"2 attempts.*1,500 bytes are kept"):
        fetch(f"{server.url}/a.bin", tmp_path / "a.bin", DIGEST, retries=1, pause=0.0)
    assert not (tmp_path / "a.bin").exists()
    fetch(f"{server.url}/a.bin", tmp_path / "a.bin", DIGEST)
    assert server.asked[-1][1] == "bytes=1500-"


def test_a_server_without_ranges_sends_everything_again(server: Files, tmp_path: Path) -> None:
    server.cut["/a.bin"], server.ranges = [1000], False
    fetch(f"{server.url}/a.bin", tmp_path / "a.bin", DIGEST, pause=0.0)
    assert (tmp_path / "a.bin").read_bytes() == BODY


def test_a_half_of_another_version_is_discarded(server: Files, tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(b"x" * 1000)
    fetch(f"{server.url}/a.bin", tmp_path / "a.bin", DIGEST)
    assert (tmp_path / "a.bin").read_bytes() == BODY
    assert [r for _, r in server.asked] == ["bytes=1000-", None]


def test_a_wrong_digest_leaves_no_file(server: Files, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=rf"expected sha256 {'0' * 64}.*{DIGEST}"):
        fetch(f"{server.url}/a.bin", tmp_path / "a.bin", "0" * 64)
    assert not list(tmp_path.iterdir())


def test_a_changed_file_in_the_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"other")
    with pytest.raises(DownloadError, match="delete it"):
        fetch("http://127.0.0.1:9/a.bin", tmp_path / "a.bin", DIGEST)
    assert (tmp_path / "a.bin").read_bytes() == b"other"


def test_404_is_final_and_503_is_not(server: Files, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"answered 404.*--data PATH"):
        fetch(f"{server.url}/b.bin", tmp_path / "b.bin", None)
    assert len(server.asked) == 1
    server.status["/a.bin"] = [503, 429]
    fetch(f"{server.url}/a.bin", tmp_path / "a.bin", DIGEST, pause=0.0)
    assert (tmp_path / "a.bin").exists()


def test_an_unknown_digest_is_shown_and_has_to_be_accepted(server: Files, tmp_path: Path) -> None:
    where = f"{server.url}/a.bin"
    with pytest.raises(DownloadError, match=f"--accept-sha256 {DIGEST}"):
        fetch(where, tmp_path / "a.bin", None)
    assert not (tmp_path / "a.bin").exists()
    assert fetch(where, tmp_path / "a.bin", None, accept=[DIGEST]) == DIGEST
    # The second call asked only whether there is more.
    assert [r for _, r in server.asked] == [None, f"bytes={len(BODY)}-"]


def test_no_address(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="no address"):
        fetch("nowhere", tmp_path / "a", None)


# --- the catalogue ------------------------------------------------------------------------------


def test_every_source_is_well_formed() -> None:
    for name, source in SOURCES.items():
        assert source.page.startswith("https://") and source.licence, name
        for file in source.files:
            assert file.url.startswith("https://") and urlsplit(file.url).path.endswith(file.name)
            assert file.sha256 is None or len(file.sha256) == 64


def test_get_command_fetches_all_files_of_a_benchmark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = b"a photo of a cat\n"
    path = urlsplit(SOURCES["drawbench"].files[0].url).path
    monkeypatch.setenv("MMALIGN_DATA", str(tmp_path))
    assert data_root() == tmp_path and cached("drawbench") is None
    with serve_files({path: prompts}) as server:
        command = ["data", "get", "drawbench", "--mirror", server.url]
        assert main(command) == 2
        digest = hashlib.sha256(prompts).hexdigest()
        assert f"--accept-sha256 {digest}" in capsys.readouterr().err
        assert cached("drawbench") is None
        assert main([*command, "--accept-sha256", digest]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "drawbench")
    assert cached("drawbench") == tmp_path / "drawbench"
    kept = json.loads((tmp_path / "drawbench" / COMPLETE).read_text())
    assert kept["sha256"] == {"test.txt": digest}
    assert kept["accepted_by_user"] == ["test.txt"]
    # From here on without a network.
    assert get("drawbench", mirror="http://127.0.0.1:9") == tmp_path / "drawbench"
    assert main(["data", "list"]) == 0
    assert str(tmp_path / "drawbench") in capsys.readouterr().out


def test_a_file_is_held_to_the_digest_that_was_accepted(tmp_path: Path) -> None:
    source = SOURCES["drawbench"].files[0]
    with serve_files({urlsplit(source.url).path: b"a prompt\n"}) as server:
        digest = hashlib.sha256(b"a prompt\n").hexdigest()
        folder = get("drawbench", tmp_path, accept=[digest], mirror=server.url)
    (folder / source.name).write_bytes(b"another prompt\n")
    with pytest.raises(DownloadError, match=f"expected sha256 {digest}.*delete it"):
        get("drawbench", tmp_path)
    (folder / COMPLETE).write_text("{")
    with pytest.raises(DownloadError, match=r"cannot be read.*delete"):
        get("drawbench", tmp_path)


def test_what_is_not_known_in_advance_is_said() -> None:
    said = {name: source.checked for name, source in SOURCES.items()}
    assert said["geneval"] == said["parti"] == said["inception"] == "all"
    assert said["t2i_compbench"] == "8 of 10"  # of a commit: they cannot change
    assert said["wise"] == "0 of 3, may change" and said["dreambench"] == "by hand"


def test_files_of_known_digest_come_first(tmp_path: Path) -> None:
    source = SOURCES["t2i_compbench"]
    unsure = {urlsplit(f.url).path: b"x" for f in source.files if f.sha256 is None}
    with serve_files(unsure) as server, pytest.raises(DownloadError, match="answered 404"):
        get("t2i_compbench", tmp_path, mirror=server.url)
    assert all(path not in unsure for path, _ in server.asked)


def test_what_cannot_be_fetched_is_said(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="geneval"):
        get("genevel", tmp_path)
    with pytest.raises(ValueError, match="by hand from https"):
        get("dreambench", tmp_path)
