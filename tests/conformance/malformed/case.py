"""What a member of the corpus is."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path


class Case(NamedTuple):
    """One malformed file.

    Attributes:
        name: What is wrong with it.
        code: Code of the problem that has to be reported; another one may be reported beside it.
        spoil: Makes a sound checkpoint's file malformed, given the folder that holds it.
        commands: The commands that read the file.
    """

    name: str
    code: str
    spoil: Callable[[Path], object]
    commands: tuple[str, ...]


def cases(code: str, commands: tuple[str, ...], spoils: Mapping[str, Callable[[Path], object]]) -> list[Case]:
    """Members of the corpus that are refused alike."""
    return [Case(name, code, spoil, commands) for name, spoil in spoils.items()]


def overwrite(name: str, content: bytes) -> Callable[[Path], object]:
    """Gives a file other contents."""
    return lambda folder: (folder / name).write_bytes(content)


def link_out(name: str) -> Callable[[Path], object]:
    """Puts a link to something outside of the checkpoint in the place of a file or directory."""

    def spoil(folder: Path) -> None:
        path, target = folder / name, folder.parent.parent / "private"
        target.parent.mkdir(exist_ok=True)
        if path.is_dir():
            path.rename(target)
        else:
            path.unlink(missing_ok=True)
            target.write_bytes(b"a private key")
        path.symlink_to(target)

    return spoil
