"""``mmalign studio``."""

from __future__ import annotations

import webbrowser
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from mmalign.commands.common import given

if TYPE_CHECKING:
    from mmalign.protocols import Steered


def run(args: Namespace) -> int:
    """Serve the page until interrupted; the address goes to standard output once it answers."""
    from mmalign.studio.server import check_host, serve

    address: dict[str, Any] = given(host=args.host, port=args.port)
    check_host(**address) if "host" in address else None
    studio = make(args.device or "auto")

    def started(url: str) -> None:
        print(f"studio at {url} (Ctrl-C ends it)", flush=True)
        if args.open:
            webbrowser.open(url)

    serve(studio, started=started, **address)
    return 0


def make(device: str = "auto") -> Any:
    """A studio over this suite's rewards and drawings."""
    from mmalign import api
    from mmalign.studio.jobs import Studio
    from vision_rewards.factory import load_reward

    return Studio(load_reward, api.steer, story, device)


def story(result: Steered) -> str:
    """The family tree of a result as SVG; empty where its method has none."""
    from eval.family_tree import STYLE, draw, family_tree
    from mmalign.commands.steer_run import record_of
    from mmalign.studio.jobs import SHOWN, picture

    tree = family_tree(record_of(result, 0))
    if tree is None:
        return ""
    rows = range(min(len(result.candidates), SHOWN))
    pictures = [picture(result.candidates[[i]]) for i in rows]
    return f"<style>{STYLE}</style>{draw(tree, pictures)}"
