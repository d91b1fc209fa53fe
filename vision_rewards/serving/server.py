"""Running a reward server until it is told to stop."""

from __future__ import annotations

from collections.abc import Callable

from mmalign.protocols import RewardModel
from mmalign.runtime.listening import listen, run_until_signal
from vision_rewards.serving.safety import ServerSettings, ServerSettingsError, check_exposure

GRACE = 30  # seconds that requests under way get to finish in


def serve(
    reward: RewardModel,
    settings: ServerSettings,
    *,
    host: str = "127.0.0.1",
    port: int = 8123,
    started: Callable[[str], None] | None = None,
) -> None:
    """Serve ``reward`` until SIGINT or SIGTERM; requests under way are finished first.

    Args:
        port: 0 takes a free one.
        started: told the address once connections are accepted.

    Raises:
        ServerSettingsError: reachable by others without a token, or no server packages here.
        OSError: the address is taken or not this machine's.
    """
    check_exposure(host, settings.token)
    try:
        import uvicorn

        from vision_rewards.serving.app import create_app
    except ImportError as error:
        raise ServerSettingsError(
            f"serving needs FastAPI and uvicorn ({error}): pip install 'mmalign[server]'"
        ) from error
    config = uvicorn.Config(
        create_app(reward, settings),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=GRACE,
    )
    listener = listen(host, port)
    if started is not None:
        shown = f"[{host}]" if ":" in host else host
        started(f"http://{shown}:{listener.getsockname()[1]}")
    run_until_signal(uvicorn.Server(config).run, listener)
