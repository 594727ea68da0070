"""Leaves out the tests of modules that import torch where there is none."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("torch"):
    collect_ignore = []
else:
    collect_ignore = ["test_folder.py", "test_state.py", "test_writer.py", "test_dtensor.py", "test_megatron.py"]
