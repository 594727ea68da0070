"""A world where communication is an error: every collective and every message of torch.distributed raises."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Iterator

_NAMES = re.compile(
    r"^_?(legacy_)?(all_?gather|all_?reduce|all_?to_?all|reduce|reduce_?scatter|scatter|gather|broadcast|barrier"
    r"|monitored_barrier|permute|i?send|i?recv|batch_|new_group|new_subgroups|split_group|shrink_group"
    r"|_?store_based_barrier)"
)
_NAMESPACES = {"c10d", "_c10d_functional", "c10d_functional", "_c10d_functional_autograd", "_dtensor"}


class CollectiveCalledError(AssertionError):
    """Something tried to communicate."""


@contextlib.contextmanager
def collectives_forbidden() -> Iterator[None]:
    """Make every collective raise `CollectiveCalledError`, by whatever way it is called; stores go on working.

    Functions are replaced for the whole process; operators below Python are caught on the calling thread.
    """
    import torch.distributed as dist
    import torch.distributed._functional_collectives as functional
    from torch.distributed import distributed_c10d
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoOperators(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.namespace in _NAMESPACES:
                raise CollectiveCalledError(str(function))
            return function(*args, **(kwargs or {}))

    def forbidden(name: str) -> Any:
        def call(*_: object, **__: object) -> None:
            raise CollectiveCalledError(name)

        return call

    with contextlib.ExitStack() as stack:
        for owner in (dist, distributed_c10d, functional, dist.ProcessGroup):
            for name, value in list(vars(owner).items()):
                if _NAMES.match(name) and callable(value) and not isinstance(value, type):
                    stack.enter_context(mock.patch.object(owner, name, forbidden(name)))
        stack.enter_context(NoOperators())  # type: ignore[no-untyped-call]
        yield
