"""``mmalign serve-reward``."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

from mmalign.commands.common import CommandError, given

TOKEN = "MMALIGN_REWARD_TOKEN"


def run(args: Namespace) -> int:
    """Serve a reward until interrupted; the address goes to standard output once it answers."""
    token = token_of(args.token_env)
    from mmalign.runtime.device import pick_device
    from vision_rewards.factory import load_reward
    from vision_rewards.serving.safety import Limits, ServerSettings, check_exposure
    from vision_rewards.serving.server import serve

    address: dict[str, Any] = given(host=args.host, port=args.port)
    if args.host is not None:  # before any weights are loaded
        check_exposure(args.host, token)
    limits: dict[str, Any] = given(
        max_images=args.max_images, max_pixels=args.max_pixels, max_bytes=args.max_bytes
    )
    dials: dict[str, Any] = given(batch=args.batch, max_waiting=args.max_waiting)
    settings = ServerSettings(
        token=token,
        limits=Limits(**limits),
        merge=not args.no_merge,
        device=str(pick_device(args.device)),
        **dials,
    )
    reward = load_reward(args.reward)

    def started(url: str) -> None:
        print(f"serving {reward.identity} at {url}", flush=True)

    serve(reward, settings, started=started, **address)
    return 0


def token_of(variable: str | None) -> str | None:
    """The bearer token in the environment.

    Raises:
        CommandError: a variable was named that is not set.
    """
    token = os.environ.get(variable or TOKEN) or None
    if variable is not None and token is None:
        raise CommandError(f"--token-env names {variable}, which is not set or empty")
    return token
