"""Leaves out the tests of modules that import torch where there is none."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("torch"):
    collect_ignore = []
else:
    collect_ignore = [
        "test_building.py",
        "test_dtensor.py",
        "test_extra_state.py",
        "test_folder.py",
        "test_hf_folder.py",
        "test_hybrids.py",
        "test_megatron.py",
        "test_state.py",
        "test_writer.py",
    ]
