"""What the libraries below print while they load and save."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and advice for loading or saving of a moment; errors still show."""
    from transformers.utils import logging as transformers_log

    logs: list[Any] = [transformers_log]
    if "diffusers" in sys.modules:  # rewards do not need it
        from diffusers.utils import logging as diffusers_log

        logs.append(diffusers_log)
    levels = [log.get_verbosity() for log in logs]
    bars = [log.is_progress_bar_enabled() for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # The new name of torch_dtype is unknown to the older releases that are supported.
            warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
            yield
    finally:
        for log, level, bar in zip(logs, levels, bars, strict=True):
            log.set_verbosity(level)
            if bar:
                log.enable_progress_bar()
