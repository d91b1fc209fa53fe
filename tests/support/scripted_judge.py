"""Answers of a judge that are readable in every form asked for, and follow from what is shown."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence

from chat_server import Chat
from PIL import Image


def liking(pictures: Sequence[Image.Image], text: str) -> float:
    """A number in [0, 1) that depends on every pixel and on the prompt."""
    said = re.search(r"<prompt>(.*?)</prompt>", text, re.DOTALL)
    seen = b"".join(p.tobytes() for p in pictures) + (said[1] if said else "").encode()
    return int.from_bytes(hashlib.sha256(seen).digest()[:4], "big") / 2**32


def answer(chat: Chat) -> str:
    """A readable answer to any of the shipped questions."""
    text = chat.text
    if '{"criteria"' in text:
        return json.dumps({"criteria": ["shapes are right", "colours are right", "no artefacts"]})
    own = liking(chat.images, text)
    if '{"verdicts"' in text:
        verdicts = [
            {"criterion": k, "reason": "seen", "met": own * 4 > k}
            for k in range(1, 1 + len(re.findall(r"^\d+\. ", text, re.MULTILINE)))
        ]
        return json.dumps({"verdicts": verdicts})
    if "<score>[" in text:
        points = range(len(re.findall(r"^\d+\. ", text, re.MULTILINE)))
        met = [int(own * (len(points) + 1) > k + 1) for k in points]
        reasons = json.dumps(["seen"] * len(met))
        return f"<analysis>{reasons}</analysis>\n<score>{met}</score>"
    if '"regions": [' in text:
        region = {"label": "it", "box": [0.1, 0.2, 0.6, 0.9], "reason": "seen", "score": own}
        return json.dumps({"regions": [region], "reason": "seen", "score": 2 * own - 1})
    if "Detailed Judgement" in text:
        return _critique(own)
    if "Final Score" in text:
        return f"It is fine.\nFinal Score: {1 + 4 * own:.3f}"
    if '"score": [' in text:
        return json.dumps({"reasoning": "seen", "score": [25 * own, 25 - 5 * own]})
    if '"winner"' in text or "Image 1 is better" in text:
        return _comparison(
            liking(chat.images[:1], text) >= liking(chat.images[1:], text), '"winner"' in text
        )
    names = re.findall(r'^  "(\w+)": \{', text, re.MULTILINE)
    return json.dumps({n: {"reason": "seen", "score": 1 + 4 * own} for n in names})


def _comparison(first: bool, as_json: bool) -> str:
    if as_json:
        return json.dumps({"reason": "seen", "winner": "A" if first else "B"})
    return f"Image {1 if first else 2} is better"


def _critique(own: float) -> str:
    titles = (
        "Text Faithfulness", "Image Faithfulness", "Physical and Visual Quality", "Text Rendering",
    )  # fmt: skip
    sections = "\n".join(
        f"{k}. {title}\n## Justification: seen\n## Score: {1 + 3 * own:.3f}"
        for k, title in enumerate(titles, 1)
    )
    return f"# Detailed Judgement\n{sections}\n# Summary:\nfine\n# Refined Request:\nthe same"
