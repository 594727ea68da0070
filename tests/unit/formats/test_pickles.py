"""Pickles are read as data: like pickle where harmless, an error everywhere else, and nothing ever runs."""

from __future__ import annotations

import collections
import copyreg
import os
import pickle
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardway.core.errors import Code, ShardwayError
from shardway.formats.pickle_writer import STOP, PickleWriter, integer
from shardway.formats.pickles import Reference, SavedObject, load_pickle

ALLOWED: dict[tuple[str, str], object] = {
    ("collections", "OrderedDict"): Reference("collections.OrderedDict", dict),
    ("torch", "bfloat16"): "the bfloat16 constant",
    ("some.module", "Thing"): Reference("some.module.Thing"),
}
REFUSED = {Code.PICKLE_FORBIDDEN, Code.PICKLE_INVALID}


def load(data: bytes, **options: Any) -> Any:
    return load_pickle(data, allowed=ALLOWED, file="a.pkl", **options)


def assert_refusal(error: ShardwayError) -> None:
    assert error.codes <= REFUSED


def refused(data: bytes, **options: Any) -> ShardwayError:
    with pytest.raises(ShardwayError) as caught:
        load(data, **options)
    assert caught.value.codes <= REFUSED
    assert caught.value.problems[0].file == "a.pkl"
    return caught.value


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(min_value=-(2**200), max_value=2**200)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.binary(max_size=300)
)
KEYS = st.text(st.characters(exclude_categories=["Cs"])) | st.integers(-(2**40), 2**40) | st.tuples(st.integers(0, 9))
VALUES = st.recursive(
    SCALARS | st.frozensets(st.integers()) | st.sets(st.text("ab")),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner),
    max_leaves=20,
)


@given(VALUES, st.sampled_from([4, 5]))
def test_plain_values_are_read_as_pickle_reads_them(value: object, protocol: int) -> None:
    assert load(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol(protocol: int) -> None:
    shared = ["shared", 1.5]
    value = {"a": (1, -1, 255, 256, 65535, 65536, -(2**31), 2**31, 2**63), "b": shared, "c": shared, "d": [True, None]}
    value["many"] = [f"string {i}" for i in range(600)]  # beyond one byte of memo indices
    value["long"] = "x" * 70_000
    assert load(pickle.dumps(value, protocol)) == value


def test_shared_parts_stay_shared() -> None:
    shared: list[object] = []
    loaded = load(pickle.dumps([shared, shared]))
    assert loaded[0] is loaded[1]


class Named:
    def __init__(self, **attributes: object) -> None:
        self.__dict__.update(attributes)


def pickled_as(value: object, module: str, name: str, protocol: int = 4) -> bytes:
    """`value` pickled with the class `Named` renamed."""
    own = Named.__module__.encode()
    data = pickle.dumps(value, protocol)
    if protocol < 4:
        return data.replace(b"c%s\nNamed\n" % own, f"c{module}\n{name}\n".encode())
    for old, new in ((own, module.encode()), (b"Named", name.encode())):
        data = data.replace(bytes((0x8C, len(old))) + old, bytes((0x8C, len(new))) + new)
    return data


@pytest.mark.parametrize("protocol", [2, 4])
def test_objects_of_the_table_become_inert(protocol: int) -> None:
    loaded = load(pickled_as([Named(a=1, b="x"), Named()], "some.module", "Thing", protocol))
    assert [(type(item), item.type_name, item.args, item.state) for item in loaded] == [
        (SavedObject, "some.module.Thing", (), {"a": 1, "b": "x"}),
        (SavedObject, "some.module.Thing", (), None),
    ]


def test_constants_calls_and_references() -> None:
    call = b"ccollections\nOrderedDict\n)Rcsome.module\nThing\nK\x01K\x02\x86R"
    constant, empty, made, reference = load(b"\x80\x04](ctorch\nbfloat16\n" + call + b"csome.module\nThing\ne.")
    assert (constant, empty) == ("the bfloat16 constant", {})
    assert (made.type_name, made.args) == ("some.module.Thing", (1, 2))
    assert isinstance(reference, Reference)
    assert reference.name == "some.module.Thing"
    assert not callable(reference)


def test_inert_packages() -> None:
    data = b"\x80\x02cmegatron.core.enums\nColour\nK\x05\x85R."
    refused(data)
    made = load(data, inert_packages=("megatron.",))
    assert (made.type_name, made.args) == ("megatron.core.enums.Colour", (5,))
    refused(b"\x80\x02cmegatronic\nColour\n.", inert_packages=("megatron.",))
    refused(b"\x80\x02cmegatron.core\nA\x1b[31m\n.", inert_packages=("megatron.",))


def test_persistent_ids() -> None:
    data = b"\x80\x02X\x01\x00\x00\x00aQ."
    assert load(data, persistent=lambda name: {"id": name}) == {"id": "a"}
    assert refused(data).code == Code.PICKLE_FORBIDDEN


class Attack:
    """Pickles to a call of anything."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("place", ["alone", "nested", "key", "state"])
def test_calls_are_refused_and_not_made(protocol: int, place: str, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    for call in (
        (os.system, (f"touch {marker}",)),
        (eval, (f"open({str(marker)!r}, 'w')",)),
        (exec, (f"open({str(marker)!r}, 'w')",)),
        (open, (str(marker), "w")),
        (getattr, (Path, "touch")),
        (os.mkdir, (str(marker),)),
        (__import__, ("os",)),
        (Path(marker).touch, ()),
        (copyreg._reconstructor, (Path, object, None)),  # type: ignore[attr-defined]
    ):
        attack = Attack(*call)
        value = {
            "alone": attack,
            "nested": [({"a": attack},)],
            "key": {(1, attack): 2},
            "state": Attack(dict, (), {"a": attack}),
        }
        refused(pickle.dumps(value[place], protocol))
    assert not marker.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"\x80\x04\x8c\x0bcollections\x8c\x1aOrderedDict.__init_class__\x93.",  # dotted names walk attributes
        b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",
        b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93.",
        b"cposix\nsystem\n(S'true'\ntR.",
        b"(iposix\nsystem\n.",
        b"(cposix\nsystem\no.",
        b"\x80\x02(csome.module\nThing\no.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02\x83\x01\x01.",
        b"\x80\x02\x84\x01\x01\x01\x01.",
        b"\x80\x02Pname\n.",
        b"\x80\x04csome.module\nThing\n)}\x92.",
    ],
)
def test_opcodes_that_reach_out_are_refused(data: bytes) -> None:
    error = refused(data)
    if not data.startswith((b"c", b"(")):
        assert error.code == Code.PICKLE_FORBIDDEN
        assert "nothing was executed" in str(error)


def test_registered_extensions_are_not_fetched() -> None:
    copyreg.add_extension("os", "getcwd", 77)
    try:
        data = pickle.dumps(os.getcwd, 2).replace(b"cnt\ngetcwd\n", b"").replace(b"cposix\ngetcwd\n", b"\x82\x4d")
        pickle.loads(b"\x80\x02\x82\x4d.")  # fills the cache that bypasses find_class
        assert refused(b"\x80\x02\x82\x4d.").code == Code.PICKLE_FORBIDDEN
        refused(data)
    finally:
        copyreg.remove_extension("os", "getcwd", 77)


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02ccollections\nOrderedDict\nN}X\x01\x00\x00\x00aK\x01s\x86b.",  # slot state on a class
        b"\x80\x02ccollections\nOrderedDict\n}X\x04\x00\x00\x00makeK\x01sb.",
        b"\x80\x02csome.module\nThing\n}X\x04\x00\x00\x00makeK\x01sb.",
        b"\x80\x02]}X\x01\x00\x00\x00aK\x01sb.",
        b"\x80\x02K\x01}b.",
        b"\x80\x02csome.module\nThing\n)\x81}b}b.",  # twice
        b"\x80\x02csome.module\nThing\n)\x81)R.",  # an instance is called
        b"\x80\x02ccollections\nOrderedDict\n)\x81.",  # a function is no class
        b"\x80\x02K\x01)R.",
        b"\x80\x02K\x01)\x81.",
        b"\x80\x02csome.module\nThing\nK\x01R.",
        b"\x80\x02csome.module\nThing\nK\x01\x81.",
        b"\x80\x02ctorch\nbfloat16\n)R.",
        b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.",  # the stand-in itself raises TypeError
        b"\x80\x02)K\x01a.",
        b"\x80\x02)(K\x01e.",
        b"\x80\x02](K\x01K\x02u.",
        b"\x80\x02}(K\x01u.",
        b"\x80\x02}]K\x01s.",  # a list as a key
        b"\x80\x02}]\x85K\x01s.",
        b"\x80\x04\x8f(]\x90.",
        b"\x80\x04(]\x91.",
        b"\x80\x04]( K\x01\x90.",
    ],
)
def test_states_calls_and_items_where_there_are_none(data: bytes) -> None:
    assert refused(data).code == Code.PICKLE_INVALID
    assert ALLOWED["collections", "OrderedDict"].make is dict  # type: ignore[attr-defined]
    assert ALLOWED["some.module", "Thing"].make is None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        b"\x80\x02",
        b"\x80\x00N.",
        b"\x80\x06N.",
        b"\x80\x04.",
        b"\x80\x04NN.",
        b"\x80\x04(N.",
        b"\x80\x04N.N",
        b"\x80\x04t.",
        b"\x80\x04h\x00.",
        b"\x80\x04j\x00\x00\x00\x00.",
        b"\x80\x04\x94.",
        b"\x80\x04Nq\x01.",
        b"\x80\x04\x95\x00\x00.",
        b"\x80\x04\xff.",
        b"\x80\x04N2.",
        b"\x80\x04NN0.",
        b"\x80\x04U\x01a.",
        b"\x80\x04I1\n.",
        b"\x80\x04\x8c\x02\xc3\x28.",
        b"\x80\x04\x8c\x03\xed\xa0\x80.",  # a lone surrogate
        b"\x80\x04ca\n\xff\n.",
        b"\x80\x04ca",
        b"\x80\x04K\x01K\x02\x93.",
        b"\x80\x04G\x00.",
        b"\x80\x04\x8aff.",
    ],
)
def test_nonsense(data: bytes) -> None:
    assert refused(data).code == Code.PICKLE_INVALID


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"a.",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"a.",
        b"\x80\x04B" + struct.pack("<I", 2**32 - 1) + b"a.",
        b"\x80\x04X" + struct.pack("<I", 2**31) + b"a.",
        b"\x80\x04\x96" + struct.pack("<Q", 2**40) + b"a.",
        b"\x80\x04\x8b" + struct.pack("<I", 2**30) + b"a.",
        b"\x80\x04Nr" + struct.pack("<I", 2**31) + b".",
        b"\x80\x04\x8a\xff" + bytes(255) + b".",
    ],
)
def test_claims_of_gigabytes_take_no_memory(data: bytes) -> None:
    assert refused(data).code == Code.PICKLE_INVALID


def test_hashing_bombs_end_at_once() -> None:
    # Forty tuples, each twice the one before: hashing the last takes 2**40 steps.
    doubling = b"".join(b"\x94h" + bytes((depth,)) + b"\x86" for depth in range(40))
    start = time.monotonic()
    refused(b"\x80\x04})" + doubling + b"Ns.")
    refused(b"\x80\x04\x8f()" + doubling + b"\x90.")
    refused(b"\x80\x04()" + doubling + b"\x91.")
    assert time.monotonic() - start < 5


def test_deep_nesting_needs_no_recursion() -> None:
    depth = 200_000
    loaded = load(b"\x80\x04" + b"]" * depth + b"a" * (depth - 1) + b".")
    count = 0
    while loaded:
        loaded, count = loaded[0], count + 1
    assert count == depth - 1


def test_truncations_are_errors() -> None:
    data = pickled_as({"a": [Named(x=(1, 2.5, "y" * 300, 2**40)), collections.OrderedDict()]}, "some.module", "Thing")
    load(data)
    for length in range(len(data)):
        assert refused(data[:length]).code == Code.PICKLE_INVALID


OPCODES = [bytes((code,)) for code in range(256)]
FRAGMENTS = [
    b"csome.module\nThing\n",
    b"ccollections\nOrderedDict\n",
    b"X\x01\x00\x00\x00a",
    b"\x8c\x01b",
    b"K\x01",
    b"h\x00",
]


@given(
    st.lists(st.sampled_from([*OPCODES, *FRAGMENTS * 10, *[b"(", b")", b"}", b"]", b"\x94", b"R", b"b", b"u"] * 10]))
)
def test_random_opcodes_end_in_a_value_or_an_error(parts: list[bytes]) -> None:
    try:
        load(b"\x80\x04" + b"".join(parts) + b".", persistent=lambda pid: None)
    except ShardwayError as error:
        assert_refusal(error)


@given(st.data())
def test_mutations_end_in_a_value_or_an_error(data: st.DataObject) -> None:
    good = bytearray(pickled_as({"a": [Named(x=(1, "y"))], "b": (2.5, {1: None})}, "some.module", "Thing"))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        load(bytes(good))
    except ShardwayError as error:
        assert_refusal(error)


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_the_writer_writes_is_read_by_pickle(protocol: int) -> None:
    writer = PickleWriter(protocol)
    texts = ["a", "b" * 255, "c" * 256, "é", "a"] + [f"{i}" for i in range(300)]
    numbers = [0, 255, 256, 65535, 65536, -1, -(2**31), 2**31, 2**63 - 1, -(2**63)]
    parts = [writer.sequence(map(writer.text, texts)), writer.sequence(map(integer, numbers))]
    parts += [writer.reference("collections", "OrderedDict") for _ in range(2)]
    data = writer.start + writer.sequence(parts) + STOP
    assert pickle.loads(data) == (tuple(texts), tuple(numbers), collections.OrderedDict, collections.OrderedDict)
    assert data.count(b"OrderedDict") == 1
    assert load(data)[:2] == (tuple(texts), tuple(numbers))
