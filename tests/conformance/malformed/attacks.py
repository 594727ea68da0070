"""Pickles that want something to be executed, and pickles that want memory or time."""

from __future__ import annotations

import struct


def text(value: str) -> bytes:
    """A string's opcodes."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def named(module: str, name: str) -> bytes:
    """A global's opcodes."""
    return f"c{module}\n{name}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    """A call's opcodes."""
    return function + b"(" + b"".join(arguments) + b"tR"


COMMAND = text("touch executed")
_GETATTR = named("builtins", "getattr")
_IMPORT = named("builtins", "__import__")

# Each leaves one value; by the name that the refusal has to give.
ATTACKS: dict[str, tuple[str, bytes]] = {
    "os.system": ("os.system", call(named("os", "system"), COMMAND)),
    "posix.system": ("posix.system", call(named("posix", "system"), COMMAND)),
    "exec": ("builtins.exec", call(named("builtins", "exec"), text("open('executed', 'w')"))),
    "eval": ("builtins.eval", call(named("builtins", "eval"), text("open('executed', 'w')"))),
    "exec by its old name": ("__builtin__.exec", call(named("__builtin__", "exec"), text("open('executed', 'w')"))),
    "open": ("builtins.open", call(named("builtins", "open"), text("executed"), text("w"))),
    "import": ("builtins.__import__", call(_IMPORT, text("antigravity"))),
    "a process": ("subprocess.Popen", call(named("subprocess", "Popen"), COMMAND)),
    "a pickle in a pickle": ("pickle.loads", call(named("pickle", "loads"), b"C\x10cos\nsystem\n(tR..")),
    "torch.load": ("torch.load", call(named("torch", "load"), text("x.pt"))),
    "os.system through getattr of a module": (
        "builtins.__import__",
        call(call(_GETATTR, call(_IMPORT, text("os")), text("system")), COMMAND),
    ),
    "eval through getattr of the built-ins": (
        "builtins.__import__",
        call(call(_GETATTR, call(_IMPORT, text("builtins")), text("eval")), text("open('executed', 'w')")),
    ),
    "getattr of a name that is allowed": (
        "getattr",
        call(_GETATTR, named("collections", "OrderedDict"), text("__init__")),
    ),
    "a chain of getattr": (
        "getattr",
        call(_GETATTR, call(_GETATTR, named("torch", "Size"), text("__class__")), text("__subclasses__")),
    ),
    "getattr of itself": ("getattr", call(_GETATTR, _GETATTR, text("__self__"))),
    "a dotted name": (
        "collections.OrderedDict.__init__.__globals__",
        text("collections") + text("OrderedDict.__init__.__globals__") + b"\x93",
    ),
    "a name that was put into the memo": (
        "posix.system",
        text("posix") + b"q\x00" + text("system") + b"q\x01h\x00h\x01\x93" + b"\x86\x86",
    ),
    "a memo that is overwritten": (
        "posix.system",
        b"".join(text(each) + b"q" + bytes((k % 2,)) for k, each in enumerate(("torch", "Size", "posix", "system")))
        + b"h\x00h\x01\x93"
        + b"\x86" * 4,
    ),
    "INST": ("INST", b"(ios\nsystem\n"),
    "OBJ": ("OBJ", b"(" + named("torch", "Size") + COMMAND + b"o"),
    "NEWOBJ_EX": ("NEWOBJ_EX", named("torch", "Size") + b")}\x92"),
    "an extension": ("EXT1", b"\x82\x01"),
    "an extension of four bytes": ("EXT4", b"\x84\x01\x00\x00\x00"),
    "a persistent id in words": ("PERSID", b"Pname\n"),
}


def _doubling(depth: int, at: int = 0) -> bytes:
    """Tuples of which each holds the one before it twice; the first goes into memo `at`."""
    return b")" + b"".join(b"q" + bytes((at + k,)) + b"h" + bytes((at + k,)) + b"\x86" for k in range(depth))


# Each asks for gigabytes, or for years; by the code of the refusal when it is the whole pickle of a file of torch.save.
BOMBS: dict[str, tuple[str, bytes]] = {
    "bytes of exabytes": ("pickle-invalid", b"\x8e" + struct.pack("<Q", 2**62) + b"x"),
    "bytes of gigabytes": ("pickle-invalid", b"B" + struct.pack("<I", 2**32 - 1) + b"x"),
    "text of a terabyte": ("pickle-invalid", b"\x8d" + struct.pack("<Q", 2**40) + b"x"),
    "a bytearray of a terabyte": ("pickle-invalid", b"\x96" + struct.pack("<Q", 2**40) + b"x"),
    "an integer of gigabytes": ("pickle-invalid", b"\x8b" + struct.pack("<i", 2**31 - 1) + b"x"),
    "an integer of 255 bytes": ("pickle-invalid", b"\x8a\xff" + b"\x7f" * 255),
    "a memo index of billions": ("pickle-invalid", b"Nr" + struct.pack("<I", 2**32 - 1)),
    "a memo read of billions": ("pickle-invalid", b"j" + struct.pack("<I", 2**32 - 1)),
    "a hundred thousand lists in each other": ("torch-file-invalid", b"]" * 100_000 + b"a" * 99_999),
    "a hundred thousand tuples in each other": ("torch-file-invalid", b")" + b"\x85" * 100_000),
    "two million sets": ("pickle-invalid", b"(" + b"\x8f" * 2_000_000 + b"t"),
    "eight million dicts": ("pickle-invalid", b"(" + b"}" * 8_000_000 + b"t"),
    "tuples that double": ("torch-file-invalid", _doubling(60)),
    "a key that doubles": ("pickle-invalid", b"}" + _doubling(60) + b"Ns"),
    "a set that doubles": ("pickle-invalid", b"\x8f(" + _doubling(60) + b"\x90"),
    "keys that collide": (
        "pickle-invalid",
        b"}("
        + b"".join(b"\x8a\x0a" + ((2**61 - 1) * k).to_bytes(10, "little") + b"N" for k in range(1, 60_001))
        + b"u",
    ),
    "members that collide": (
        "torch-file-invalid",
        b"c__builtin__\nset\n(]("
        + b"".join(b"\x8a\x0a" + ((2**61 - 1) * k).to_bytes(10, "little") for k in range(1, 60_001))
        + b"etR",
    ),
    "a value that contains itself": ("torch-file-invalid", b"]q\x00h\x00a"),
    "text that is repeated": (
        "torch-file-invalid",
        text("x" * 100_000) + b"q\x00(" + b"h\x00" * 100_000 + b"t\x86",
    ),
}
