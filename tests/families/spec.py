"""What the tests of families need to know of a tiny model of one."""

from __future__ import annotations

import dataclasses
import json
import zlib
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

VOCABULARY = 128
# What nearly every config has; a spec says what is different.
COMMON: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FamilySpec:
    """A tiny model of one architecture.

    Attributes:
        name: Unique among all specs.
        architecture: Class in transformers, which makes the model; the same as in ``config.architectures``.
        config: Name of its config class in transformers.
        values: What its config has beside `COMMON`; None takes a key of `COMMON` away.
        layout: How megatron-core keeps the layers of such a model.
        stackable: Whether its layers are alike, so that both layouts apply.
        released: The architecture that `edit` makes of it, where that is another.
        dtype: Of the weights.
        edit: Changes the written directory to what a released model looks like.
        packed: Whether all experts of a layer are written as one tensor, as transformers has them in memory.
        twin: Whether transformers can't run what `edit` made, so that the model before it stands in for it in
            `reference`.
        megatron: Empty where megatron-core's own layers run such a model on a CPU; else why not.
        megatron_fields: Fields of megatron-core's config to be changed so that it runs.
        wide_norms: Whether its layers get query and key norms that span all heads, which megatron-core lacks.
        unasked: Endings of keys that such a Megatron model leaves in the checkpoint.
        tolerance: On the difference of float32 logits.
    """

    name: str
    architecture: str
    config: str
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layout: Literal["stacked", "per-layer"] = "stacked"
    stackable: bool = True
    released: str = ""
    dtype: str = "bfloat16"
    edit: Callable[[Path], None] | None = None
    packed: bool = False
    twin: bool = False
    megatron: str = ""
    megatron_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    wide_norms: bool = False
    unasked: tuple[str, ...] = ()
    tolerance: float = 1e-4

    @property
    def layouts(self) -> tuple[str, ...]:
        """The layouts that apply."""
        return ("stacked", "per-layer") if self.stackable else ("per-layer",)

    def make(self, path: Path) -> Path:
        """Write the model with random weights, the same bytes each time."""
        import torch
        import transformers
        from tests.models import randomise

        values = {key: value for key, value in {**COMMON, **self.values}.items() if value is not None}
        model = getattr(transformers, self.architecture)(getattr(transformers, self.config)(**values))
        randomise(model, seed=zlib.crc32(self.name.encode()))
        model.to(getattr(torch, self.dtype))
        model.save_pretrained(path, save_original_format=not self.packed)
        if self.twin:
            model.save_pretrained(self.reference(path))
        if self.edit is not None:
            self.edit(path)
        return path

    def reference(self, path: Path) -> Path:
        """The directory with which transformers computes what the model at `path` should."""
        return path.with_name(f"{path.name}_twin") if self.twin else path


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a model directory."""
    values: dict[str, Any] = json.loads((path / "config.json").read_text())
    return values


def as_released(path: Path, architecture: str, model_type: str, values: Mapping[str, object]) -> None:
    """Change the config of a model."""
    config = read_config(path) | {"architectures": [architecture], "model_type": model_type, **values}
    (path / "config.json").write_text(json.dumps(config, indent=2))


def rewrite(path: Path, change: Any) -> None:
    """Change the weights of a model: `change` gets them by name and returns what is to be written."""
    from safetensors.torch import load_file, save_file

    file = path / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
