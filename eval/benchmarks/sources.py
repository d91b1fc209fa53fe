"""Where the official files of benchmarks come from, and the folder they are kept in.

A file with a digest is the one this project's readers were tested on; where the digest is
``None``, nobody here has seen the file, and fetching asks the user to look at it first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from mmalign.registry import unknown
from mmalign.runtime.download import DownloadError, fetch
from mmalign.runtime.files import atomic_write_json

GITHUB = "https://raw.githubusercontent.com"
HUB = "https://huggingface.co/datasets"
COMPLETE = "files.json"  # written last


@dataclass(frozen=True)
class File:
    """One file: its name in the folder, where it comes from, its digest where that is known."""

    name: str
    url: str
    sha256: str | None = None

    @property
    def moving(self) -> bool:
        """Whether the address names a branch, whose file may change, and no commit or release."""
        return "/main/" in self.url


@dataclass(frozen=True)
class Source:
    """A benchmark's official files; none where they cannot be fetched without a person.

    ``page`` is where they are described, ``licence`` theirs.
    """

    page: str
    licence: str
    files: tuple[File, ...] = ()

    @property
    def checked(self) -> str:
        """How many of the files can be checked by a digest known in advance, in words."""
        unknown_ = [f for f in self.files if f.sha256 is None]
        if not self.files:
            return "by hand"
        if not unknown_:
            return "all"
        moving = ", may change" if any(f.moving for f in unknown_) else ""
        return f"{len(self.files) - len(unknown_)} of {len(self.files)}{moving}"


_COMPBENCH = f"{GITHUB}/Karine-Huang/T2I-CompBench"
_C7, _CF = "7710d059c3391fe97fbf9e2ad3813ed0e7d87979", "fc2c9b9f8ec357dcf1bb1b382c0df017afe9cd8c"
_PARTI = "2c99f6652cbc7f0d0441aa91f4c7e7055bcb0071"
_DREAMBOOTH = "e9b8c013ef2e30ab3d5d9018808513e9093e3bc4"
_COMPBENCH_FILES = (
    ("color", _C7, "1634259756dbc77d13093d907d414480080ec9790a8c97ad09efaea7b2534f2d"),
    ("shape", _C7, "37e1a276906c7ea9516cbd7ac8501be896006c0c17ca7344f260562834455bae"),
    ("texture", _C7, "fbb5363515b4a28009e360afaaaf389d2dd2289e50dbb0c6ef4ea0c7fe4f3d4f"),
    ("spatial", _C7, "8707a1d7e42ce3002d95363cf55f74bd043c843ae27108f5125aaaa7840ca988"),
    ("non_spatial", "41388b8b6ae716108ebb507133930c1f030990c3",
     "04c56cc9ac441dc9ea6c5157652058bd1635b5308526dd31bb29a1caab9a758d"),
    ("complex", _C7, "1b808018b8d9916db3d47d5aa2ef18377a3549a56901a474156f799824cdf3b4"),
    ("3d_spatial", _CF, "c9953597315f36a5fcb41291bb19bdc6ab5f64a0fa760d691b4854a73f5d1fe9"),
    ("numeracy", _CF, "dad8df141604b70ba7554bec724e3db0a80023680769b5c514854ea2d2527bbe"),
)  # fmt: skip


def _compbench() -> tuple[File, ...]:
    told = [
        File(f"{name}_val.txt", f"{_COMPBENCH}/{commit}/examples/dataset/{name}_val.txt", digest)
        for name, commit, digest in _COMPBENCH_FILES
    ]
    parts = [f"complex_val_{part}.txt" for part in ("spatial", "action")]
    return (*told, *(File(n, f"{_COMPBENCH}/{_C7}/examples/dataset/{n}") for n in parts))


def _flow_grpo(what: str) -> tuple[File, ...]:
    return (File("test.txt", f"{GITHUB}/yifan123/flow_grpo/main/dataset/{what}/test.txt"),)


SOURCES: dict[str, Source] = {
    "geneval": Source(
        "https://github.com/djghosh13/geneval",
        "MIT",
        (
            File(
                "evaluation_metadata.jsonl",
                f"{GITHUB}/djghosh13/geneval/main/prompts/evaluation_metadata.jsonl",
                "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
            ),
        ),
    ),
    "t2i_compbench": Source("https://github.com/Karine-Huang/T2I-CompBench", "MIT", _compbench()),
    "dpg_bench": Source(
        "https://github.com/TencentQQGYLab/ELLA",
        "Apache-2.0",
        (File("dpg_bench.csv", f"{GITHUB}/TencentQQGYLab/ELLA/main/dpg_bench/dpg_bench.csv"),),
    ),
    "unigenbench": Source(
        "https://github.com/CodeGoat24/UniGenBench",
        "CC BY 4.0",
        (
            File(
                "test_prompts_en.csv",
                f"{GITHUB}/CodeGoat24/UniGenBench/main/data/test_prompts_en.csv",
                "f82e8ce854985ef963378eaaf8ce12f2e3a57dd6f53e1aea84a61fbeadfe4459",
            ),
        ),
    ),
    "parti": Source(
        "https://github.com/google-research/parti",
        "Apache-2.0",
        (
            File(
                "PartiPrompts.tsv",
                f"{GITHUB}/google-research/parti/{_PARTI}/PartiPrompts.tsv",
                "fab29e41bb512a169b56acab4cf2a41dcb675e285df2efcde6640c7dd3c440eb",
            ),
        ),
    ),
    "vbench": Source(
        "https://github.com/Vchitect/VBench",
        "Apache-2.0",
        (
            File(
                "VBench_full_info.json",
                f"{GITHUB}/Vchitect/VBench/master/vbench/VBench_full_info.json",
                "5dd2de80ee43cda750b2b72ea7023657c0b90d3702041c7e4608c65dbe50dccd",
            ),
        ),
    ),
    "hpsv2": Source(
        "https://huggingface.co/datasets/zhwang/HPDv2",
        "see the card",
        tuple(
            File(f"{style}.json", f"{HUB}/zhwang/HPDv2/resolve/main/benchmark/{style}.json")
            for style in ("anime", "concept-art", "paintings", "photo")
        ),
    ),
    "ocr": Source("https://github.com/yifan123/flow_grpo", "MIT", _flow_grpo("ocr")),
    "drawbench": Source(
        "https://github.com/yifan123/flow_grpo", "unclear", _flow_grpo("drawbench")
    ),
    "pickscore": Source(
        "https://github.com/yifan123/flow_grpo", "unclear", _flow_grpo("pickscore")
    ),
    "wise": Source(
        "https://github.com/PKU-YuanGroup/WISE",
        "none given",
        tuple(
            File(f"{name}.json", f"{GITHUB}/PKU-YuanGroup/WISE/main/data/{name}.json")
            for name in ("cultural_common_sense", "spatio-temporal_reasoning", "natural_science")
        ),
    ),
    "inception": Source(
        "https://github.com/toshas/torch-fidelity",
        "Apache-2.0",
        (
            File(
                "weights-inception-2015-12-05-6726825d.pth",
                "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
                "weights-inception-2015-12-05-6726825d.pth",
                # As several projects that use the file tell it; nobody here has fetched it.
                "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
            ),
        ),
    ),
    "genai_bench": Source("https://huggingface.co/datasets/BaiqiL/GenAI-Bench", "Apache-2.0"),
    "dreambench": Source(
        f"https://github.com/google/dreambooth/tree/{_DREAMBOOTH}/dataset", "CC BY 4.0, mixed"
    ),
}


def data_root(cache: str | Path | None = None) -> Path:
    """The folder of fetched files: ``cache``, else ``MMALIGN_DATA``, else in the user's cache."""
    given = cache or os.environ.get("MMALIGN_DATA")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(home) / "mmalign" / "data"


def cached(name: str, cache: str | Path | None = None) -> Path | None:
    """The folder of a benchmark's files where they have all been fetched, else ``None``."""
    folder = data_root(cache) / name
    return folder if (folder / COMPLETE).is_file() else None


def get(
    name: str,
    cache: str | Path | None = None,
    *,
    accept: Collection[str] = (),
    mirror: str | None = None,
) -> Path:
    """Fetch a benchmark's files and return their folder; what is there already is only checked.

    A file whose digest nobody knew is checked against the digest that was accepted when it was
    fetched, which ``files.json`` beside it keeps.

    Args:
        name: a key of :data:`SOURCES`.
        cache: see :func:`data_root`.
        accept: digests the user takes for files whose digest is not known in advance.
        mirror: another server, as ``http://host:port``, that has the same paths.

    Raises:
        UnknownNameError: not a benchmark with files.
        ValueError: its files cannot be fetched by a program.
        DownloadError: see :func:`~mmalign.runtime.download.fetch`.
    """
    if name not in SOURCES:
        raise unknown("benchmark with official files", name, SOURCES)
    source = SOURCES[name]
    if not source.files:
        raise ValueError(f"{name}: fetch the files by hand from {source.page}, use --data PATH")
    folder = data_root(cache) / name
    before = _accepted(folder)
    found: dict[str, str] = {}
    # Those that are sure come first: a question about the others leaves them in place.
    for file in sorted(source.files, key=lambda f: f.sha256 is None):
        path = folder / file.name
        wanted = file.sha256 or (before.get(file.name) if path.is_file() else None)
        found[file.name] = fetch(_at(file.url, mirror), path, wanted, accept=accept)
    unsure = sorted(f.name for f in source.files if f.sha256 is None)
    record = {"page": source.page, "sha256": found, "accepted_by_user": unsure}
    atomic_write_json(folder / COMPLETE, record)
    return folder


def _accepted(folder: Path) -> dict[str, str]:
    """Digests by file that an earlier call kept."""
    path = folder / COMPLETE
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise DownloadError(f"{path} cannot be read ({error}): delete {folder}") from error


def _at(url: str, mirror: str | None) -> str:
    if mirror is None:
        return url
    return mirror.rstrip("/") + urlsplit(url).path
