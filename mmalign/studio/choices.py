"""What the studio's form offers: generators, rewards, and the options of every steering method."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

from mmalign.policies.load import SHIPPED, TINY
from mmalign.registry import REWARDS, STEERERS
from mmalign.steering.common import Sampling

# Options with a field of their own on the form, and those that only Python can give.
_ELSEWHERE = ("seed", "expand", "decoder", "value")
_COMMON = ("steps", "guidance_scale", "batch_size", "dtype")  # of every method: shown last
_ROLE = re.compile(r":\w+:`~?(?:\w+\.)*(\w+)`|``|:math:|`")
_ENTRY = re.compile(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {8,}.*)*)", re.MULTILINE)


def choices() -> dict[str, Any]:
    """Everything the form needs, as plain data."""
    return {
        "policies": [name for name in SHIPPED if name not in TINY],
        "rewards": [
            {"name": entry.name, "summary": entry.summary}
            for entry in REWARDS
            if _judges_pictures(entry.info)
        ],
        "methods": [
            {"name": e.name, "summary": e.summary, "options": options_of(STEERERS.load(e.name))}
            for e in STEERERS
        ],
    }


def options_of(method: type) -> list[dict[str, Any]]:
    """Name, default and meaning of each option of a method that a form can ask for."""
    said = _meanings(method)
    found = []
    for field in dataclasses.fields(method):
        default = field.default
        if default is dataclasses.MISSING:
            default = None
        plain = default is None or isinstance(default, (bool, int, float, str))
        if field.init and field.name not in _ELSEWHERE and plain:
            found.append({"name": field.name, "default": default, "help": said.get(field.name, "")})
    return sorted(found, key=lambda option: option["name"] in _COMMON)


def _meanings(method: type) -> dict[str, str]:
    """What the ``Args`` of a class and of those it derives from say about each name."""
    found: dict[str, str] = {}
    for cls in (*reversed(method.__mro__[:-1]), Sampling):  # whose options all methods share
        text = inspect.cleandoc(cls.__doc__ or "").partition("Args:\n")[2]
        text = text.partition("\n\n")[0]
        for names, meaning in _ENTRY.findall(text):
            plain = " ".join(_ROLE.sub(lambda m: m[1] or "", meaning).split())
            found.update(dict.fromkeys(names.split(", "), plain))
    return found


def _judges_pictures(info: Any) -> bool:
    """Whether a reward can say something about one picture and its prompt."""
    if info is None:
        return True
    return "image" in info.media and info.scope == "pointwise" and set(info.needs) <= {"prompt"}
