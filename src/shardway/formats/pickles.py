"""Pickles read as data: an interpreter of the opcodes that builds inert values and never imports, calls or sets anything."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, NoReturn

from shardway.core.errors import Code, Problem, ShardwayError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Allowed = Mapping[tuple[str, str], object]

_MAX_INTEGER_BYTES = 32  # no checkpoint counts past 2**255; longer integers only serve to burn time


class Reference:
    """A name that a pickle mentions; it stands for itself and is never imported.

    Attributes:
        name: The dotted name, such as ``"torch.Size"``.
        make: What stands in for calling it, a function of shardway's own; None makes a `SavedObject`.
    """

    __slots__ = ("make", "name")

    def __init__(self, name: str, make: Callable[..., object] | None = None) -> None:
        self.name = name
        self.make = make

    def __repr__(self) -> str:
        return f"<{self.name}>"


class SavedObject:
    """An object in a pickle, kept as what the pickle says about it: nothing of its class runs.

    Attributes:
        type_name: Dotted name of its class or of the function that would have built it.
        args: What the class or function would have been called with.
        state: What the object's state would have been set to (mostly a dict of its attributes), or None.
    """

    __slots__ = ("args", "state", "type_name")

    def __init__(self, type_name: str, args: tuple[object, ...] = (), state: object = None) -> None:
        self.type_name = type_name
        self.args = args
        self.state = state

    def __repr__(self) -> str:
        return f"SavedObject({self.type_name!r}, args={self.args!r}, state={self.state!r})"


def load_pickle(
    data: bytes,
    *,
    allowed: Allowed,
    file: str,
    persistent: Callable[[object], object] | None = None,
    inert_packages: tuple[str, ...] = (),
) -> Any:
    """Read the pickle `data` without importing, calling or setting anything that it names.

    Opcodes of protocols 2 to 5 build None, bools, integers, floats, strings, bytes, tuples, lists, dicts, sets,
    constants from `allowed`, results of shardway's own functions in `allowed`, and `SavedObject`. Time and memory are
    linear in the size of `data`.

    Args:
        data: The whole pickle.
        allowed: The closed table of (module, name): a `Reference`, or any other value as a constant.
        file: The file to name in errors.
        persistent: Answers persistent ids; None forbids them.
        inert_packages: Names inside these packages (``"megatron."``) are accepted too, as references that make
            `SavedObject`.

    Returns:
        The object that the pickle describes.

    Raises:
        ShardwayError: `pickle-forbidden` for a name outside the table, an extension code, or a persistent id where
            there can't be one; `pickle-invalid` for everything else that is wrong.

    Source: CPython Lib/pickletools.py (opcodes), Lib/pickle.py.
    """
    return _Machine(data, allowed, file, persistent, inert_packages).run()


class _Machine:
    """The pickle machine: a stack, its marks and a memo. Position `i` is passed through the handlers of rare opcodes."""

    __slots__ = ("allowed", "data", "file", "inert_packages", "marks", "memo", "persistent", "stack")

    def __init__(
        self,
        data: bytes,
        allowed: Allowed,
        file: str,
        persistent: Callable[[object], object] | None,
        inert_packages: tuple[str, ...],
    ) -> None:
        self.data = data
        self.allowed = allowed
        self.file = file
        self.persistent = persistent
        self.inert_packages = inert_packages
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[object] = []

    def run(self) -> object:
        # The opcodes of a .metadata file by falling frequency are decoded in place: a file of 50,000 chunks has six
        # million of them.
        data, stack, marks, memo = self.data, self.stack, self.marks, self.memo
        push, pop, remember = stack.append, stack.pop, memo.append
        unsigned32 = struct.Struct("<I").unpack_from
        i = 0
        try:
            while True:
                op = data[i]
                i += 1
                if op == 0x94:  # MEMOIZE
                    remember(stack[-1])
                elif op == 0x6A:  # LONG_BINGET
                    push(memo[unsigned32(data, i)[0]])
                    i += 4
                elif op == 0x68:  # BINGET
                    push(memo[data[i]])
                    i += 1
                elif op == 0x4B:  # BININT1
                    push(data[i])
                    i += 1
                elif op == 0x29:  # EMPTY_TUPLE
                    push(())
                elif op == 0x81:  # NEWOBJ
                    args = pop()
                    stack[-1] = self._new(stack[-1], args)
                elif op == 0x28:  # MARK
                    marks.append(len(stack))
                elif op == 0x62:  # BUILD
                    state = pop()
                    target = stack[-1]
                    if type(target) is not SavedObject or target.state is not None:
                        self._fail("a state is set on something that has none")
                    target.state = state
                elif op == 0x7D:  # EMPTY_DICT
                    push({})
                elif op == 0x75:  # SETITEMS
                    start = marks.pop()
                    items = stack[start:]
                    del stack[start:]
                    self._set_items(items)
                elif op == 0x4E:  # NONE
                    push(None)
                elif op == 0x85:  # TUPLE1
                    stack[-1] = (stack[-1],)
                elif op == 0x52:  # REDUCE
                    args = pop()
                    stack[-1] = self._reduce(stack[-1], args)
                elif op == 0x87:  # TUPLE3
                    third, second = pop(), pop()
                    stack[-1] = (stack[-1], second, third)
                elif op == 0x4D:  # BININT2
                    push(data[i] | data[i + 1] << 8)
                    i += 2
                elif op == 0x86:  # TUPLE2
                    second = pop()
                    stack[-1] = (stack[-1], second)
                elif op == 0x74:  # TUPLE
                    start = marks.pop()
                    items = stack[start:]
                    del stack[start:]
                    push(tuple(items))
                elif op == 0x2E:  # STOP
                    return self._result(i)
                else:
                    handler = _RARE.get(op)
                    if handler is None:
                        self._refuse_opcode(op)
                    i = handler(self, i)
        except ShardwayError as error:
            if error.problems[0].file is None:  # from one of our constructors, which do not know the file
                raise ShardwayError(self._problem(error.code, error.problems[0].what, i)) from None
            raise
        except (IndexError, KeyError, TypeError, ValueError, OverflowError, struct.error) as error:
            ended = i >= len(data)
            what = "the pickle ends in the middle" if ended else f"the pickle makes no sense ({error})"
            raise ShardwayError(self._problem(Code.PICKLE_INVALID, what, i)) from None

    def _result(self, i: int) -> object:
        if len(self.stack) != 1 or self.marks:
            self._fail(f"the pickle ends with {len(self.stack)} values instead of one")
        if i != len(self.data):
            self._fail(f"{len(self.data) - i} bytes follow the end of the pickle")
        return self.stack[0]

    def _new(self, cls: object, args: object) -> SavedObject:
        if type(cls) is not Reference or cls.make is not None or type(args) is not tuple:
            self._fail("an object is made of something that is no class")
        return SavedObject(cls.name, args)

    def _reduce(self, function: object, args: object) -> object:
        if type(function) is not Reference or type(args) is not tuple:
            self._fail("something that is no function is called")
        return SavedObject(function.name, args) if function.make is None else function.make(*args)

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        keys = items[::2]
        if type(target) is not dict or len(items) % 2:
            self._fail("items are set on something that is no dict")
        for key in keys:
            if type(key) is not str:
                self._check_key(key)
        target.update(zip(keys, items[1::2], strict=True))

    def _check_key(self, key: object) -> None:
        # Hashing nested tuples takes time exponential in their depth when they share parts.
        parts = key if type(key) is tuple else (key,)
        if not all(type(part) in _HASHABLE for part in parts):
            self._fail(f"a {type(key).__name__} is used as a key")

    def _global(self, module: str, name: str) -> None:
        value = self.allowed.get((module, name))
        if value is None:
            if not f"{module}.".startswith(self.inert_packages or " "):
                self._forbid(f"the pickle names {module}.{name}")
            value = Reference(f"{module}.{name}")
        self.stack.append(value)

    def _problem(self, code: Code, what: str, i: int | None = None) -> Problem:
        facts = () if i is None else (f"at byte {i:,} of {len(self.data):,} of the pickle",)
        cure = "the file is damaged, or is not a checkpoint: copy or save it again"
        return Problem(code=code, what=what, file=self.file, facts=facts, cure=cure)

    def _fail(self, what: str) -> NoReturn:
        raise ShardwayError(self._problem(Code.PICKLE_INVALID, what))

    def _forbid(self, what: str) -> NoReturn:
        raise ShardwayError(
            Problem(
                code=Code.PICKLE_FORBIDDEN,
                what=f"{what}, which no checkpoint needs",
                file=self.file,
                facts=("shardway never imports or runs what a checkpoint names; nothing was executed",),
                cure="do not load this file with anything that does, unless you know where it comes from",
            )
        )

    def _refuse_opcode(self, op: int) -> NoReturn:
        if op in _FORBIDDEN_OPCODES:
            self._forbid(f"the pickle uses opcode {_FORBIDDEN_OPCODES[op]}")
        self._fail(f"opcode 0x{op:02x} is unknown or not used by pickles of Python 3")

    # The rarer opcodes; each takes the position after the opcode and returns the position after its argument.

    def _take(self, i: int, size: int) -> bytes:
        if size > len(self.data) - i:
            self._fail(f"a value claims {size:,} bytes where {len(self.data) - i:,} are left")
        return self.data[i : i + size]

    def _integer(self, i: int, size: int) -> int:
        return int.from_bytes(self._take(i, size), "little")

    def _proto(self, i: int) -> int:
        if not 2 <= self.data[i] <= 5:
            self._fail(f"pickle protocol {self.data[i]}; 2 to 5 are known")
        return i + 1

    def _frame(self, i: int) -> int:
        self._take(i, 8)
        return i + 8

    def _int32(self, i: int) -> int:
        self.stack.append(int.from_bytes(self._take(i, 4), "little", signed=True))
        return i + 4

    def _long1(self, i: int) -> int:
        size = self.data[i]
        if size > _MAX_INTEGER_BYTES:
            self._fail(f"an integer of {size} bytes")
        self.stack.append(int.from_bytes(self._take(i + 1, size), "little", signed=True))
        return i + 1 + size

    def _float(self, i: int) -> int:
        self.stack.append(struct.unpack_from(">d", self.data, i)[0])
        return i + 8

    def _true(self, i: int) -> int:
        self.stack.append(True)
        return i

    def _false(self, i: int) -> int:
        self.stack.append(False)
        return i

    def _counted(self, i: int, width: int) -> tuple[bytes, int]:
        size = self._integer(i, width)
        return self._take(i + width, size), i + width + size

    def _text(self, i: int, width: int) -> int:
        data, i = self._counted(i, width)
        self.stack.append(str(data, "utf-8", "surrogatepass"))
        return i

    def _text1(self, i: int) -> int:
        return self._text(i, 1)

    def _text4(self, i: int) -> int:
        return self._text(i, 4)

    def _text8(self, i: int) -> int:
        return self._text(i, 8)

    def _bytes1(self, i: int) -> int:
        data, i = self._counted(i, 1)
        self.stack.append(data)
        return i

    def _bytes4(self, i: int) -> int:
        data, i = self._counted(i, 4)
        self.stack.append(data)
        return i

    def _bytes8(self, i: int) -> int:
        data, i = self._counted(i, 8)
        self.stack.append(data)
        return i

    def _put(self, index: int) -> None:
        # Every pickler numbers its memo from zero without gaps; anything else would let one number claim gigabytes.
        if index == len(self.memo):
            self.memo.append(self.stack[-1])
        elif index < len(self.memo):
            self.memo[index] = self.stack[-1]
        else:
            self._fail(f"memo index {index:,} where {len(self.memo):,} come next")

    def _binput(self, i: int) -> int:
        self._put(self.data[i])
        return i + 1

    def _long_binput(self, i: int) -> int:
        self._put(self._integer(i, 4))
        return i + 4

    def _list(self, i: int) -> int:
        self.stack.append([])
        return i

    def _append(self, i: int) -> int:
        self._extend([self.stack.pop()])
        return i

    def _appends(self, i: int) -> int:
        self._extend(self._since_mark())
        return i

    def _extend(self, items: list[object]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            self._fail("items are appended to something that is no list")
        target.extend(items)

    def _setitem(self, i: int) -> int:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])
        return i

    def _empty_set(self, i: int) -> int:
        self.stack.append(set())
        return i

    def _additems(self, i: int) -> int:
        items = self._since_mark()
        target = self.stack[-1]
        if type(target) is not set:
            self._fail("items are added to something that is no set")
        for item in items:
            self._check_key(item)
        target.update(items)
        return i

    def _frozenset(self, i: int) -> int:
        items = self._since_mark()
        for item in items:
            self._check_key(item)
        self.stack.append(frozenset(items))
        return i

    def _since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _global_lines(self, i: int) -> int:
        end = self.data.index(b"\n", i)
        stop = self.data.index(b"\n", end + 1)
        self._global(self.data[i:end].decode(), self.data[end + 1 : stop].decode())
        return stop + 1

    def _stack_global(self, i: int) -> int:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            self._fail("a name that is no string")
        self._global(module, name)
        return i

    def _persistent(self, i: int) -> int:
        if self.persistent is None:
            self._forbid("the pickle uses a persistent id")
        self.stack[-1] = self.persistent(self.stack[-1])
        return i


_HASHABLE = frozenset((str, int, bool, float, type(None), bytes, SavedObject))
_RARE: dict[int, Callable[[_Machine, int], int]] = {
    0x80: _Machine._proto,
    0x95: _Machine._frame,
    0x4A: _Machine._int32,
    0x8A: _Machine._long1,
    0x47: _Machine._float,
    0x88: _Machine._true,
    0x89: _Machine._false,
    0x8C: _Machine._text1,
    0x58: _Machine._text4,
    0x8D: _Machine._text8,
    0x43: _Machine._bytes1,
    0x42: _Machine._bytes4,
    0x8E: _Machine._bytes8,
    0x71: _Machine._binput,
    0x72: _Machine._long_binput,
    0x5D: _Machine._list,
    0x61: _Machine._append,
    0x65: _Machine._appends,
    0x73: _Machine._setitem,
    0x8F: _Machine._empty_set,
    0x90: _Machine._additems,
    0x91: _Machine._frozenset,
    0x63: _Machine._global_lines,
    0x93: _Machine._stack_global,
    0x51: _Machine._persistent,
}
_FORBIDDEN_OPCODES = {
    0x69: "INST",
    0x6F: "OBJ",
    0x82: "EXT1",
    0x83: "EXT2",
    0x84: "EXT4",
    0x92: "NEWOBJ_EX",
    0x50: "PERSID",
}
