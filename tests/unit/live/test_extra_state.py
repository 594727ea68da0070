"""Extra states of a checkpoint are given to modules, where they hold something."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from shardway.formats.dcp import DcpLocation
from shardway.formats.saved_objects import read_torch_bytes
from shardway.formats.torch_dist import extra_state
from shardway.live.extra_state import restore


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save([value], file)
    return file.getvalue()


def test_what_holds_something_is_restored() -> None:
    """Placeholders of ours and of Megatron Bridge are passed over, what can't be read is reported."""
    factors = torch.tensor([[1.5, 2.0]])
    blobs = {
        "none": extra_state(),
        "empty": saved(torch.empty(0, dtype=torch.uint8)),
        "factors": saved(factors),
        "odd": saved(Path("x")),
        "shared": saved(factors),
    }
    locations = {key: DcpLocation("__0_0.distcp", place, len(blob)) for place, (key, blob) in enumerate(blobs.items())}
    locations["shared"] = locations["factors"]
    read: list[str] = []

    def read_object(key: str) -> object:
        read.append(key)
        return read_torch_bytes(blobs[key], file=key)

    # Stands for a TorchDistCheckpoint: what is asked of it is a location and an object.
    checkpoint: Any = SimpleNamespace(places=locations, read_object=read_object)
    given: dict[str, Any] = {}

    def setter(key: str) -> Any:
        return lambda state: given.__setitem__(key, state)

    notes = restore({key: setter(key) for key in [*blobs, "absent"]}, checkpoint)
    assert given.keys() == {"factors", "shared"}
    assert torch.equal(given["factors"], factors)
    assert read.count("factors") + read.count("shared") == 1
    (note,) = notes
    assert note == "1 extra states were left as they are, such as odd: their form is not known"
