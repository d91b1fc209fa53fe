"""Tests download nothing: a checkpoint that is not already here is a skip, not a wait."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
