"""Pickles read as data: an interpreter of opcodes that builds inert values and never imports or calls anything."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from shardway.core.errors import Code, Problem, ShardwayError

if TYPE_CHECKING:
    from collections.abc import Mapping

    Allowed = Mapping[tuple[str, str], object]
    Fields = Mapping[str, tuple[str, ...]]

_MAX_INTEGER_BYTES = 32  # no checkpoint counts past 2**255; longer integers only serve to burn time
_MAX_NAME_BYTES = 1000
# Python hashes numbers without a secret, so whoever chooses the keys of a dict can make them all collide; that many
# take a second or two.
_MAX_ODD_KEYS = 50_000
# Bytes of memory, at most, for what some opcodes of one byte make. What torch and Megatron write comes to 5 to 10 bytes
# for each byte of a pickle.
_SETS, _SET_BYTES = b"\x8f\x91", 232
_OTHERS, _OTHER_BYTES = b"}]\x81\x85\x86\x87", 80
_MOST_DENSE, _FREE_BYTES = 16, 1 << 24


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


def enum_lookup(is_enum: Callable[[str], bool]) -> Reference:
    """What stands in for `getattr`, by which Python 3.11.0 to 3.11.3 pickle the members of enums, and for that alone.

    Args:
        is_enum: Whether a dotted name is an enum's.

    Returns:
        A function of an enum and the name of a member, which makes a `SavedObject` of the enum with that name.
    """

    def look_up(*args: object) -> SavedObject:
        match args:
            case (Reference(name=enum, make=None), str(member)) if is_enum(enum) and _MEMBER.fullmatch(member):
                return SavedObject(enum, (member,))
        raise ShardwayError(
            Problem(
                code=Code.PICKLE_FORBIDDEN, what="the pickle calls getattr for something else than an enum's member"
            )
        )

    return Reference("builtins.getattr", look_up)


_MEMBER = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,99}")


def load_pickle(
    data: bytes,
    *,
    allowed: Allowed,
    file: str,
    persistent: Callable[[object], object] | None = None,
    inert_packages: tuple[str, ...] = (),
    fields: Fields | None = None,
) -> object:
    """Read the pickle `data` without importing, calling or setting anything that it names.

    Opcodes of protocols 2 to 5 build None, bools, integers, floats, strings, bytes, tuples, lists, dicts, sets,
    constants from `allowed`, results of shardway's own functions in `allowed`, and `SavedObject`. Time is linear in the
    size of `data`, and memory at most some 60 bytes for each of its bytes.

    Args:
        data: The whole pickle.
        allowed: The closed table of (module, name): a `Reference`, or any other value as a constant.
        file: The file to name in errors.
        persistent: Answers persistent ids; None forbids them.
        inert_packages: Names inside these packages (``"megatron."``) are accepted too, as references that make
            `SavedObject`.
        fields: By the dotted name of a class, the attributes of its objects that are of interest. Of the dict that is
            such an object's state a tuple of these is kept, None for each that it lacks, which takes a third of the
            memory; a state that is no dict counts for none.

    Returns:
        The object that the pickle describes.

    Raises:
        ShardwayError: `pickle-forbidden` for a name outside the table, an extension code, or a persistent id where
            there can't be one; `pickle-invalid` for everything else that is wrong.

    Source: CPython Lib/pickletools.py (opcodes), Lib/pickle.py.
    """
    machine = _Machine(data, allowed, file, persistent, inert_packages, fields or {})
    machine.check_density()
    return machine.run()


class _Machine:
    """The machine that a pickle programs: a stack, its marks and a memo."""

    __slots__ = (
        "allowed",
        "data",
        "fields",
        "file",
        "inert",
        "inert_packages",
        "marks",
        "memo",
        "num_odd_keys",
        "persistent",
        "stack",
    )

    def __init__(
        self,
        data: bytes,
        allowed: Allowed,
        file: str,
        persistent: Callable[[object], object] | None,
        inert_packages: tuple[str, ...],
        fields: Fields,
    ) -> None:
        self.data = data
        self.allowed = allowed
        self.file = file
        self.persistent = persistent
        self.inert_packages = inert_packages
        self.fields = fields
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[object] = []
        self.inert: dict[str, Reference] = {}
        self.num_odd_keys = 0

    def check_density(self) -> None:
        """Refuse a pickle that would take far more memory than its size: little but empty lists, dicts or sets."""
        data = self.data
        sets, others = (len(data) - len(data.translate(None, opcodes)) for opcodes in (_SETS, _OTHERS))
        if sets * _SET_BYTES + others * _OTHER_BYTES > _MOST_DENSE * len(data) + _FREE_BYTES:
            self.fail(f"its {len(data):,} bytes make millions of empty lists, dicts or sets")

    def run(self) -> object:
        # The opcodes of a .metadata file by falling frequency are decoded in place: a file of 50,000 chunks has six
        # million of them.
        data, stack, marks, memo = self.data, self.stack, self.marks, self.memo
        fields_of = self.fields.get
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
                        self.fail("a state is set on something that has none")
                    fields = fields_of(target.type_name)
                    if fields is not None:
                        state = tuple(map(state.get, fields)) if type(state) is dict else None
                    target.state = state
                elif op == 0x7D:  # EMPTY_DICT
                    push({})
                elif op == 0x75:  # SETITEMS
                    start = marks.pop()
                    items = stack[start:]
                    del stack[start:]
                    self.set_items(items)
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
                    i = handler(self, op, i)
        except ShardwayError as error:
            if error.problems[0].file is None:  # from one of our constructors, which do not know the file
                if error.code is Code.PICKLE_FORBIDDEN:
                    self.forbid(error.problems[0].what)
                raise ShardwayError(self._problem(error.code, error.problems[0].what, i)) from None
            raise
        except (IndexError, KeyError, TypeError, ValueError, OverflowError, struct.error) as error:
            ended = i >= len(data)
            what = "the pickle ends in the middle" if ended else f"the pickle makes no sense ({error})"
            raise ShardwayError(self._problem(Code.PICKLE_INVALID, what, i)) from None

    def _result(self, i: int) -> object:
        if len(self.stack) != 1 or self.marks:
            self.fail(f"the pickle ends with {len(self.stack)} values instead of one")
        if i != len(self.data):
            self.fail(f"{len(self.data) - i} bytes follow the end of the pickle")
        return self.stack[0]

    def _new(self, cls: object, args: object) -> SavedObject:
        if type(cls) is not Reference or cls.make is not None or type(args) is not tuple:
            self.fail("an object is made of something that is no class")
        return SavedObject(cls.name, args)

    def _reduce(self, function: object, args: object) -> object:
        if type(function) is not Reference or type(args) is not tuple:
            self.fail("something that is no function is called")
        return SavedObject(function.name, args) if function.make is None else function.make(*args)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        keys = items[::2]
        if type(target) is not dict or len(items) % 2:
            self.fail("items are set on something that is no dict")
        for key in keys:
            if type(key) is not str:
                self.check_key(key)
        target.update(zip(keys, items[1::2], strict=True))

    def check_key(self, key: object) -> None:
        if type(key) is SavedObject:  # hashed by identity
            return
        self.num_odd_keys += 1
        if self.num_odd_keys > _MAX_ODD_KEYS:
            self.fail(f"more than {_MAX_ODD_KEYS:,} keys and members of sets are no strings")
        # Hashing nested tuples takes time exponential in their depth when they share parts.
        parts = key if type(key) is tuple else (key,)
        if not all(type(part) in _HASHABLE for part in parts):
            self.fail(f"a {type(key).__name__} is used as a key")

    def push_global(self, module: str, name: str) -> None:
        value = self.allowed.get((module, name))
        if value is None:
            full = f"{module[:200]}.{name[:200]}"
            if not full.startswith(self.inert_packages or "\0") or not full.isprintable():
                self.forbid(f"the pickle names {full if full.isprintable() else ascii(full)}")
            value = self.inert.setdefault(full, Reference(full))  # one, for a name that is repeated would multiply
        self.stack.append(value)

    def _problem(self, code: Code, what: str, i: int | None = None) -> Problem:
        facts = () if i is None else (f"at byte {i:,} of {len(self.data):,} of the pickle",)
        cure = "the file is damaged, or is not a checkpoint: copy or save it again"
        return Problem(code=code, what=what, file=self.file, facts=facts, cure=cure)

    def fail(self, what: str) -> NoReturn:
        raise ShardwayError(self._problem(Code.PICKLE_INVALID, what))

    def forbid(self, what: str) -> NoReturn:
        raise ShardwayError(
            Problem(
                code=Code.PICKLE_FORBIDDEN,
                what=f"{what}, which no checkpoint needs",
                file=self.file,
                facts=("shardway never imports or runs what a checkpoint names; nothing was executed",),
                cure="if Megatron wrote it, report the name; otherwise do not load the file with anything else",
            )
        )

    def _refuse_opcode(self, op: int) -> NoReturn:
        if op in _FORBIDDEN_OPCODES:
            self.forbid(f"the pickle uses opcode {_FORBIDDEN_OPCODES[op]}")
        self.fail(f"opcode 0x{op:02x} is unknown or not used by pickles of Python 3")

    def take(self, i: int, size: int) -> bytes:
        """`size` bytes of the pickle from `i`."""
        if size > len(self.data) - i:
            self.fail(f"a value claims {size:,} bytes where {len(self.data) - i:,} are left")
        return self.data[i : i + size]

    def since_mark(self) -> list[Any]:
        """What was pushed since the last mark, taken off the stack."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items


# The rarer opcodes. Each function gets the opcode and the position after it, and returns where the next one is.

_Handler = Callable[[_Machine, int, int], int]
_RARE: dict[int, _Handler] = {}


def _opcodes(*codes: int) -> Callable[[_Handler], _Handler]:
    def register(handler: _Handler) -> _Handler:
        _RARE.update(dict.fromkeys(codes, handler))
        return handler

    return register


@_opcodes(0x80)  # PROTO
def _proto(machine: _Machine, _op: int, i: int) -> int:
    if not 2 <= machine.data[i] <= 5:
        machine.fail(f"pickle protocol {machine.data[i]}; 2 to 5 are known")
    return i + 1


@_opcodes(0x95)  # FRAME
def _frame(machine: _Machine, _op: int, i: int) -> int:
    machine.take(i, 8)
    return i + 8


@_opcodes(0x88, 0x89)  # NEWTRUE, NEWFALSE
def _bool(machine: _Machine, op: int, i: int) -> int:
    machine.stack.append(op == 0x88)
    return i


@_opcodes(0x4A, 0x8A)  # BININT, LONG1
def _integer(machine: _Machine, op: int, i: int) -> int:
    size = 4
    if op == 0x8A:
        size = machine.data[i]
        i += 1
    if size > _MAX_INTEGER_BYTES:
        machine.fail(f"an integer of {size} bytes")
    machine.stack.append(int.from_bytes(machine.take(i, size), "little", signed=True))
    return i + size


@_opcodes(0x47)  # BINFLOAT
def _float(machine: _Machine, _op: int, i: int) -> int:
    machine.stack.append(struct.unpack_from(">d", machine.data, i)[0])
    return i + 8


@_opcodes(0x8C, 0x58, 0x8D, 0x43, 0x42, 0x8E)  # SHORT_BINUNICODE, BINUNICODE, ..8, SHORT_BINBYTES, BINBYTES, ..8
def _counted(machine: _Machine, op: int, i: int) -> int:
    width = 1 if op in {0x8C, 0x43} else 4 if op in {0x58, 0x42} else 8
    size = int.from_bytes(machine.take(i, width), "little")
    data = machine.take(i + width, size)
    machine.stack.append(str(data, "utf-8") if op in {0x8C, 0x58, 0x8D} else data)
    return i + width + size


@_opcodes(0x71, 0x72)  # BINPUT, LONG_BINPUT
def _put(machine: _Machine, op: int, i: int) -> int:
    # Every pickler numbers its memo from zero without gaps; anything else would let one number claim gigabytes.
    width = 1 if op == 0x71 else 4
    index = int.from_bytes(machine.take(i, width), "little")
    if index > len(machine.memo):
        machine.fail(f"memo index {index:,} where {len(machine.memo):,} comes next")
    machine.memo[index : index + 1] = machine.stack[-1:]
    return i + width


@_opcodes(0x5D, 0x8F)  # EMPTY_LIST, EMPTY_SET
def _empty(machine: _Machine, op: int, i: int) -> int:
    machine.stack.append([] if op == 0x5D else set())
    return i


@_opcodes(0x61, 0x65)  # APPEND, APPENDS
def _append(machine: _Machine, op: int, i: int) -> int:
    items = [machine.stack.pop()] if op == 0x61 else machine.since_mark()
    target = machine.stack[-1]
    if type(target) is not list:
        machine.fail("items are appended to something that is no list")
    target.extend(items)
    return i


@_opcodes(0x73)  # SETITEM
def _setitem(machine: _Machine, _op: int, i: int) -> int:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.set_items([key, value])
    return i


@_opcodes(0x90, 0x91)  # ADDITEMS, FROZENSET
def _set(machine: _Machine, op: int, i: int) -> int:
    items = machine.since_mark()
    for item in items:
        machine.check_key(item)
    if op == 0x91:
        machine.stack.append(frozenset(items))
        return i
    target = machine.stack[-1]
    if type(target) is not set:
        machine.fail("items are added to something that is no set")
    target.update(items)
    return i


@_opcodes(0x63)  # GLOBAL
def _global(machine: _Machine, _op: int, i: int) -> int:
    end = machine.data.index(b"\n", i)
    stop = machine.data.index(b"\n", end + 1)
    if stop - i > _MAX_NAME_BYTES:
        machine.fail(f"a name of {stop - i:,} bytes")
    machine.push_global(machine.data[i:end].decode(), machine.data[end + 1 : stop].decode())
    return stop + 1


@_opcodes(0x93)  # STACK_GLOBAL
def _stack_global(machine: _Machine, _op: int, i: int) -> int:
    name, module = machine.stack.pop(), machine.stack.pop()
    if type(name) is not str or type(module) is not str:
        machine.fail("a name that is no string")
    machine.push_global(module, name)
    return i


@_opcodes(0x51)  # BINPERSID
def _persistent(machine: _Machine, _op: int, i: int) -> int:
    if machine.persistent is None:
        machine.forbid("the pickle uses a persistent id")
    machine.stack[-1] = machine.persistent(machine.stack[-1])
    return i


_HASHABLE = frozenset((str, int, bool, float, type(None), bytes, SavedObject))
_FORBIDDEN_OPCODES = {
    0x69: "INST",
    0x6F: "OBJ",
    0x82: "EXT1",
    0x83: "EXT2",
    0x84: "EXT4",
    0x92: "NEWOBJ_EX",
    0x50: "PERSID",
}
