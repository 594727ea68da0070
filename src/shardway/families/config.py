"""Reading a Hugging Face config.json: typed look-ups that name the file and the key when something is off."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from shardway.core.errors import Code, Problem, ShardwayError

if TYPE_CHECKING:
    from collections.abc import Mapping


_FEW = 1000
_CLASS = re.compile(r"\w{1,200}")


class HFConfig:
    """A config.json as read, with look-ups that accept the spellings of transformers 4 and 5.

    Attributes:
        values: The parsed JSON object.
        file: Where it came from, for error messages.
    """

    __slots__ = ("file", "values")

    def __init__(self, values: Mapping[str, object], file: str = "config.json") -> None:
        self.values = values
        self.file = file

    @property
    def architecture(self) -> str:
        """The first entry of ``architectures``.

        Raises:
            ShardwayError: `config-invalid` when there is none.
        """
        listed = self.values.get("architectures")
        if isinstance(listed, list) and listed and isinstance(listed[0], str) and _CLASS.fullmatch(listed[0]):
            return listed[0]
        raise self.invalid("architectures", listed, "a list with the name of a model class, such as LlamaForCausalLM")

    def get(self, key: str) -> object:
        """The value of `key`, or None where it is absent or null."""
        return self.values.get(key)

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer.

        Raises:
            ShardwayError: `config-invalid` when it is absent without a default, or not a positive integer.
        """
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**40:
            raise self.invalid(key, value, "a positive integer")
        return value

    def whole(self, key: str, default: int) -> int:
        """An integer that is 0 or more; null counts as absent.

        Raises:
            ShardwayError: `config-invalid` when it is something else.
        """
        value = self.values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**40:
            raise self.invalid(key, value, "an integer, 0 or more")
        return value

    def few(self, key: str, default: int) -> int:
        """As `whole`, for what is enumerated before the weights are looked at, such as layers that predict tokens.

        Raises:
            ShardwayError: `config-invalid` when it is something else, or more than 1,000.
        """
        value = self.whole(key, default)
        if value > _FEW:
            raise self.invalid(key, value, f"at most {_FEW}")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        """A boolean; null counts as absent.

        Raises:
            ShardwayError: `config-invalid` when it is something else.
        """
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.invalid(key, value, "true or false")
        return value

    def number(self, key: str, default: float) -> float:
        """A real number.

        Raises:
            ShardwayError: `config-invalid` when it is something else.
        """
        value = self.values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.invalid(key, value, "a number")
        return float(value)

    @property
    def rope(self) -> dict[str, object]:
        """Rotary embedding parameters under transformers 5's names (``rope_type``, ``rope_theta``, ``factor``, ...)."""
        merged: dict[str, object] = {}
        if self.values.get("rope_theta") is not None:
            merged["rope_theta"] = self.values["rope_theta"]
        for key in ("rope_scaling", "rope_parameters"):
            value = self.values.get(key)
            if value is None:
                continue
            if not isinstance(value, dict):
                raise self.invalid(key, value, "an object")
            merged.update(value)
        merged.setdefault("rope_type", merged.get("type", "default"))
        return merged

    @property
    def dtype(self) -> str | None:
        """The dtype that the config declares, by torch's name; None where it says nothing."""
        value = self.values.get("dtype", self.values.get("torch_dtype"))
        return value.removeprefix("torch.") if isinstance(value, str) else None

    def invalid(self, key: str, value: object, expected: str) -> ShardwayError:
        """The error that says that `key` should hold `expected`."""
        found = "is missing" if value is None else f"is {value!r:.120}"
        return ShardwayError(
            Problem(code=Code.CONFIG_INVALID, what=f"{key} {found}; expected {expected}", file=self.file)
        )
