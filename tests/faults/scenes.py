"""What can be interrupted: imports, exports and live saves, to a new place or over an old checkpoint."""

from __future__ import annotations

import functools
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tests.tiny import Tiny, bits, read_distcp, read_safetensors, same

import shardway
from shardway.run.publish import is_leftover

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

MODEL = Tiny(layers=1, ffn=40)
OLD_SEED, NEW_SEED = 1, 2
IMPORT = {"max_file_size": 5000, "workers": 2}
EXPORT = {"max_shard_size": 1500, "workers": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Something that writes a checkpoint, which is to be there whole or not at all.

    Attributes:
        name: Of the scene.
        template: Directory that is copied to begin with; None: there is nothing.
        act: Writes the checkpoint of the new model to a directory.
        read: The tensors of what is there.
        old: What they are before; empty for nothing.
        new: What they are afterwards.
    """

    name: str
    template: Path | None
    act: Callable[[Path], object]
    read: Callable[[Path], Mapping[str, Any]]
    old: Mapping[str, Any]
    new: Mapping[str, Any]

    def begin(self, stage: Path) -> Path:
        """Set the scene in a new directory; return the destination."""
        stage.mkdir()
        if self.template is not None:
            shutil.copytree(self.template, stage / "out")
        return stage / "out"

    def found(self, destination: Path) -> str:
        """What a reader finds: ``"old"``, ``"new"`` or ``"nothing"``; anything else is an error.

        A folder that no tracker names yet is nothing to a reader of the root, and has to be the new one, whole.
        """
        folder = destination / "iter_0000000"
        if not shardway.is_complete(destination):
            assert not (destination / "config.json").exists(), f"{self.name}: a damaged export"
            assert not list(destination.glob("*.safetensors")), f"{self.name}: a damaged export"
            if folder.exists():
                assert not (destination / "latest_checkpointed_iteration.txt").exists()
                assert same(self.read(folder), self.new), f"{self.name}: a folder that is not whole"
            return "nothing"
        tensors = self.read(destination)
        if same(tensors, self.new):
            return "new"
        assert self.old, f"{self.name}: something else"
        assert same(tensors, self.old), f"{self.name}: neither the old one nor the new one"
        return "old"


def litter(stage: Path) -> list[str]:
    """What runs have left below a directory."""
    return sorted(
        os.path.relpath(os.path.join(folder, name), stage)
        for folder, folders, files in os.walk(stage)
        for name in (*folders, *files)
        if is_leftover(name) or "shardway-" in name or name.startswith((".publish-", ".alive-"))
    )


def make_scenes(base: Path, *, live: bool) -> dict[str, Scene]:
    """Make the sources and the old checkpoints once; return the scenes by name."""
    weights = {seed: MODEL.weights(seed) for seed in (OLD_SEED, NEW_SEED)}
    megatron = {seed: MODEL.megatron(each) for seed, each in weights.items()}
    hf = {seed: MODEL.write(base / f"hf{seed}", seed=seed, num_files=2) for seed in weights}
    for seed, path in hf.items():
        shardway.import_hf(path, base / f"mcore{seed}", fsync=False, max_file_size=5000)
    shardway.export_hf(base / f"mcore{OLD_SEED}", base / "exported", fsync=False, max_shard_size=1500)
    importing = functools.partial(_import, hf[NEW_SEED])
    exporting = functools.partial(_export, base / f"mcore{NEW_SEED}")
    mcore = {"read": read_distcp, "new": megatron[NEW_SEED]}
    files = {"read": _read_hf, "new": weights[NEW_SEED]}
    old_mcore = {"template": base / f"mcore{OLD_SEED}", "old": megatron[OLD_SEED]}
    old_files = {"template": base / "exported", "old": weights[OLD_SEED]}
    nothing: dict[str, Any] = {"template": None, "old": {}}
    scenes: dict[str, dict[str, Any]] = {
        "import": {"act": functools.partial(importing, "error"), **mcore, **nothing},
        "import, replacing": {"act": functools.partial(importing, "replace"), **mcore, **old_mcore},
        "export": {"act": functools.partial(exporting, "error"), **files, **nothing},
        "export, replacing": {"act": functools.partial(exporting, "replace"), **files, **old_files},
    }
    if live:
        _live_save(OLD_SEED, "error", base / "saved")
        new = {f"part{k}": value for k, value in enumerate(_live_values(NEW_SEED))}
        old = {f"part{k}": value for k, value in enumerate(_live_values(OLD_SEED))}
        saved = {"read": read_distcp, "new": new}
        scenes["live save"] = {"act": functools.partial(_live_save, NEW_SEED, "error"), **saved, **nothing}
        scenes["live save, replacing"] = {
            "act": functools.partial(_live_save, NEW_SEED, "replace"),
            **saved,
            "template": base / "saved",
            "old": old,
        }
    return {name: Scene(name=name, **fields) for name, fields in scenes.items()}


def _import(source: Path, if_exists: str, destination: Path) -> None:
    shardway.import_hf(source, destination, if_exists=if_exists, **IMPORT)  # type: ignore[arg-type]


def _export(source: Path, if_exists: str, destination: Path) -> None:
    shardway.export_hf(source, destination, if_exists=if_exists, **EXPORT)  # type: ignore[arg-type]


def _read_hf(path: Path) -> Mapping[str, Any]:
    return bits(read_safetensors(path).items())


def _live_values(seed: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 2**32, size=(5, 7 + k), dtype=np.uint32) for k in range(6)]


def _live_save(seed: int, if_exists: str, destination: Path) -> None:
    """Save a plain module, alone: of ranks that die beside others, tests/ranks has plenty."""
    import torch

    from shardway.live.save import CheckpointConfig, save_megatron_model

    module = torch.nn.Module()
    for k, value in enumerate(_live_values(seed)):
        module.register_parameter(f"part{k}", torch.nn.Parameter(torch.from_numpy(value).view(torch.float32)))
    config = CheckpointConfig(if_exists=if_exists, writers_per_rank=2, grace_seconds=0.0)  # type: ignore[arg-type]
    save_megatron_model(module, destination, config=config, participants=[0])
