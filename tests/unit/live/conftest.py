"""Leaves out the tests of modules that import torch where there is none."""

from __future__ import annotations

import importlib.util

collect_ignore = [] if importlib.util.find_spec("torch") else ["test_state.py", "test_writer.py"]
