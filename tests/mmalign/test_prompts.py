"""Prompt files, good and bad."""

from __future__ import annotations

import pytest

from mmalign.prompts import PromptFileError, read_prompts


def test_text_is_kept_literally(tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeffa cat\r\n\n# not a comment\n  une école\u2028ici \n".encode())
    assert read_prompts(file) == ["a cat", "# not a comment", "une école\u2028ici"]


def test_jsonl(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a", "task": "x"}\n\n{"prompt": "b"}')
    assert read_prompts(str(file)) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("p.txt", b"", ["holds no prompt"]),
        ("p.txt", b"\n \n", ["holds no prompt"]),
        ("p.txt", b"good\nbad \xe9t\xe9\n", ["not UTF-8", "byte 9", "line 2", "0xe9"]),
        ("p.jsonl", b'{"prompt": "a"}\nnope\n', ["line 2", "not JSON"]),
        ("p.jsonl", b'{"text": "a"}\n', ["line 1", "'prompt'"]),
        ("p.jsonl", b'["a"]\n', ["line 1", "'prompt'"]),
    ],
)
def test_refusals(tmp_path, name, data, words):
    file = tmp_path / name
    file.write_bytes(data)
    with pytest.raises(PromptFileError) as caught:
        read_prompts(file)
    for word in [str(file), *words]:
        assert word in str(caught.value)


def test_missing_and_folder(tmp_path):
    with pytest.raises(PromptFileError, match="does not exist"):
        read_prompts(tmp_path / "no.txt")
    with pytest.raises(PromptFileError, match="is a folder"):
        read_prompts(tmp_path)
