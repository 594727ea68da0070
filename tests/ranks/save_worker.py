"""Ranks that save a live model, fail, come late, or are killed on the way.

Run as a script by a `tests.ranks.fleet.Fleet`, this file forks the ranks of every world that it is asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from tests.ranks.fleet import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch

AT_ONCE = 4  # worlds; most of them wait most of the time


def _serve() -> None:
    import torch
    from megatron.core import dist_checkpointing  # noqa: F401
    from megatron.core.models.gpt import GPTModel  # noqa: F401
    from tests.megatron import _replace_cuda
    from tests.ranks import live_worker  # noqa: F401

    import shardway.bridge.auto
    import shardway.live.building
    import shardway.live.export
    import shardway.live.load
    import shardway.live.megatron
    import shardway.live.save  # noqa: F401

    torch.set_num_threads(1)
    _replace_cuda()
    for line in sys.stdin:
        print(json.dumps(_run_all(json.loads(line))), flush=True)


def _run_all(worlds: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    codes = [[0] * world["ranks"] for world in worlds]
    waiting = list(enumerate(worlds))
    running: dict[int, tuple[int, int]] = {}
    deadlines: dict[int, float] = {}
    while waiting or running:
        while waiting and len({number for number, _ in running.values()}) < AT_ONCE:
            number, world = waiting.pop(0)
            deadlines[number] = time.monotonic() + world["seconds"]
            running |= {pid: (number, rank) for rank, pid in enumerate(_fork(world))}
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            number, rank = running.pop(pid)
            codes[number][rank] = os.waitstatus_to_exitcode(status)
            if codes[number][rank] and rank not in worlds[number]["killed"]:
                deadlines[number] = 0.0  # the others would only wait for it
        elif not pid:
            for each, (number, _) in running.items():
                if time.monotonic() > deadlines[number]:
                    os.kill(each, signal.SIGTERM)
            time.sleep(0.005)
    return codes


def _fork(world: Mapping[str, Any]) -> list[int]:
    import socket

    listener = socket.create_server(("127.0.0.1", 0)) if world["store"] == "tcp" else None
    pids = []
    for rank in range(world["ranks"]):
        pid = os.fork()
        if not pid:
            _be(world, rank, listener)
        pids.append(pid)
    if listener is not None:
        listener.close()
    return pids


def _be(world: Mapping[str, Any], rank: int, listener: Any) -> None:
    """Be a rank, to the end of the process."""
    code = 1
    try:
        with (Path(world["folder"]) / f"rank{rank}.log").open("wb") as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        _take_part(world, rank, listener)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at once: a peer may be gone


def _take_part(world: Mapping[str, Any], rank: int, listener: Any) -> None:
    import datetime as dt

    import torch.distributed
    from tests.ranks import load_tasks
    from tests.ranks.live_worker import _parallel

    dist: Any = torch.distributed
    folder = Path(world["folder"])
    size = world["ranks"]
    if world["store"] != "none":
        store: Any
        if world["store"] == "tcp":
            port = listener.getsockname()[1]
            listening = {"master_listen_fd": listener.detach()} if not rank else {}
            store = dist.TCPStore("127.0.0.1", port, size, is_master=not rank, **listening)
        else:
            store = dist.FileStore(str(folder / "store"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=dt.timedelta(seconds=30))
    shape = {"model": world["model"], "dtype": world["dtype"], **world["grid"]}
    megatron = world["model"] is not None and world["store"] != "none"
    with _parallel(shape) if megatron else contextlib.nullcontext():
        me = _Rank(world=world, rank=rank, shape=shape, folder=folder, model=None)
        if megatron:
            me.model = _model(shape, world["source"])
        for number, task in enumerate(world["tasks"]):
            began = time.monotonic()
            do = globals().get(task["do"]) or getattr(load_tasks, task["do"])
            outcome = do(me, **{name: value for name, value in task.items() if name != "do"})
            if outcome is not None:
                answer = dataclasses.asdict(outcome) | {"seconds": time.monotonic() - began}
                (folder / f"{number}.{rank}.json").write_text(json.dumps(answer, default=str))
            _meet(folder / f"met{number}", rank, [each for each in range(size) if each not in world["killed"]])


@dataclasses.dataclass(slots=True, kw_only=True)
class _Rank:
    world: Mapping[str, Any]
    rank: int
    shape: Mapping[str, Any]
    folder: Path
    model: Any
    bridge: Any = None
    handles: dict[int, Any] = dataclasses.field(default_factory=dict)
    num_saves: int = 0


def _meet(path: Path, rank: int, expected: Sequence[int]) -> None:
    """Wait for the others without torch; who is killed is not waited for."""
    (path.parent / f"{path.name}.{rank}").touch()
    _until(lambda: all((path.parent / f"{path.name}.{other}").exists() for other in expected))


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.01)


def _model(shape: Mapping[str, Any], source: str | None) -> list[Any]:
    from tests.ranks.live_worker import _build, _described, _load, _pattern

    chunks = _build(shape)
    if source is not None:
        _load(chunks, {**shape, "checkpoint": source})
    else:
        for described in _described(chunks, shape):
            _pattern(described, described.data)
    return chunks


# Tasks


def load(me: _Rank, *, checkpoint: str, sign: int = 1) -> Outcome:
    """Load a checkpoint with megatron-core, and compare every element with the model's (times `sign`)."""
    import torch
    from tests.ranks.live_worker import _build, _load

    chunks = _build(me.shape)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(torch.nan)
    _load(chunks, {**me.shape, "checkpoint": checkpoint})
    differ = []
    for mine, loaded in zip(me.model, chunks, strict=True):
        found = dict(loaded.named_parameters())
        for name, parameter in mine.named_parameters():
            expected = parameter if sign > 0 else -parameter
            if not torch.equal(expected.contiguous().view(torch.uint8), found[name].contiguous().view(torch.uint8)):
                differ.append(name)
    assert not differ, differ
    return Outcome()


def save(
    me: _Rank,
    *,
    path: str,
    hf: str | None = None,
    absent: Sequence[int] = (),
    late: Mapping[str, str] | None = None,
    first: int | None = None,
    sign: int = 1,
    store: str | None = None,
    slow: float = 0.0,
    faults: Sequence[Mapping[str, Any]] = (),
    only: Mapping[str, Mapping[str, Any]] | None = None,
    tensor: Sequence[Any] | None = None,
    plain: str | None = None,
    change: bool = False,
    wait: bool = True,
    **options: Any,
) -> Outcome | None:
    """Save the model; no collective may be called meanwhile.

    Args:
        me: This rank.
        path: Root of the checkpoint.
        hf: Model directory, for `AutoBridge`; without one, a save of no known family.
        absent: Ranks that run a plain loop until the others have ended.
        late: What a rank waits for before it calls, by rank: ``written`` (there are shards in staging) or
            ``published``.
        first: The rank that coordinates; the others call when it does, or when something has gone wrong.
        sign: What the values are multiplied with for this save.
        store: ``file``, or ``hash``, ``filestore``, ``prefix``, ``counted`` for one that is passed.
        slow: Seconds that every piece of this save takes to be written, also after the call has returned.
        faults: What goes wrong before the call returns: see `_fault`.
        only: Arguments that are different on some ranks.
        tensor: A parameter, the number of rows that it has for this task, and the rank where it does.
        plain: A kind of ``live_worker._plain_model`` to save instead.
        change: Fill the model with another value as soon as the call has returned.
        wait: Wait for an async save here; otherwise the next task does.
        options: Arguments of `save_megatron_model` or of `CheckpointConfig`.
    """
    import torch
    from tests.collectives import collectives_forbidden

    me.num_saves += 1
    done = me.folder / f"saved{me.num_saves}"
    calling = [
        rank
        for rank in range(me.world["ranks"])
        if rank not in absent and rank not in me.world["killed"] and str(rank) not in (late or {})
    ]

    def all_done() -> bool:
        return all(done.with_name(f"{done.name}.{rank}").exists() for rank in calling)

    if me.rank in absent:
        _until(all_done)
        return None
    root = Path(path)
    if (late or {}).get(str(me.rank)) == "written":
        _until(lambda: any(root.glob(".iter*/*.distcp")))
    elif (late or {}).get(str(me.rank)) == "published":
        _until(all_done)
    if first is not None and me.rank != first:
        _until(lambda: any(me.folder.glob(f"{done.name}.f*")))  # its own mark, or that of a fault
    # Long where all come, which ends it, however busy the machine.
    options = {"grace_seconds": 1.0 if absent or late or me.world["killed"] else 10.0, **options}
    options |= (only or {}).get(str(me.rank), {})
    path = options.pop("path", path)
    model = me.model
    if plain is not None:
        from tests.ranks.live_worker import _plain_model

        model = [_plain_model(plain, me.world["ranks"])]
    try:
        with contextlib.ExitStack() as stack:
            if sign != 1:
                stack.enter_context(_negated(model))
            if tensor is not None and me.rank == tensor[2]:
                stack.enter_context(_resized(model, *tensor[:2]))
            for number, fault in enumerate(faults):
                if me.rank in (fault["rank"] if isinstance(fault["rank"], list) else [fault["rank"]]):
                    stack.enter_context(_fault(me.folder / f"{done.name}.fault{number}", path, **fault))
            if slow:
                _slow_down(path, options.get("iteration", 0), slow)
            stack.enter_context(collectives_forbidden())
            if first == me.rank:
                stack.enter_context(_marked_when_coordinating(me.folder / f"{done.name}.first"))
            saved: Any = _call(me, model, path, hf, _store(store, me.folder), options)
            notes: dict[str, Any] = {"returned": str(type(saved).__name__)}
            if type(saved).__name__ == "AsyncSave":
                me.handles[options.get("iteration", 0)] = saved
                if change:
                    with torch.no_grad():
                        for chunk in model:
                            for parameter in chunk.parameters():
                                parameter.fill_(-77.0)
                notes["done"] = saved.done()
                notes["memory"] = sorted(tensor.data_ptr() for tensor in saved.state.sources.values())
                if not wait:
                    return Outcome(notes=notes)
                saved = saved.wait()
            return Outcome(report=dataclasses.asdict(saved), notes=notes)
    except Exception as error:
        return _failed(error)
    finally:
        done.with_name(f"{done.name}.{me.rank}").touch()


@contextlib.contextmanager
def _marked_when_coordinating(mark: Path) -> Iterator[None]:
    """Make a file as soon as this rank is the one that coordinates."""
    import torch.distributed as dist

    owner = dist.distributed_c10d.PrefixStore
    real = owner.compare_set

    def instead(store: Any, key: str, expected: Any, desired: Any) -> bytes:
        found = real(store, key, expected, desired)
        if key.endswith("/lead") and found == desired != expected:
            mark.touch()
        return found

    with mock.patch.object(owner, "compare_set", instead):
        yield


def wait(me: _Rank, *, iteration: int) -> Outcome:
    """Wait for the async save of an earlier task."""
    try:
        report = me.handles[iteration].wait()
    except Exception as error:
        return _failed(error)
    assert me.handles[iteration].done()
    return Outcome(report=dataclasses.asdict(report))


def _failed(error: Exception) -> Outcome:
    problems = getattr(error, "problems", ())
    if not problems:
        traceback.print_exc()
    return Outcome(
        error=type(error).__name__,
        code=str(error.code) if problems else None,  # type: ignore[attr-defined]
        text=str(error),
        tensors=[problem.tensor for problem in problems if problem.tensor],
        files=[str(problem.file) for problem in problems if problem.file],
    )


def _call(me: _Rank, model: Any, path: str, hf: str | None, store: Any, options: dict[str, Any]) -> Any:
    from tests.ranks.live_worker import _wrapped

    import shardway
    from shardway.live.save import CheckpointConfig, save_megatron_model

    of_config = {field.name for field in dataclasses.fields(CheckpointConfig)}
    config = CheckpointConfig(**{name: value for name, value in options.items() if name in of_config})
    rest = {name: value for name, value in options.items() if name not in of_config}
    model = model[0] if len(model) == 1 and not hasattr(model[0], "sharded_state_dict") else _wrapped(model)
    if hf is None:
        return save_megatron_model(model, path, config=config, store=store, **rest)
    if me.bridge is None:
        me.bridge = shardway.AutoBridge.from_hf_pretrained(hf)
    return me.bridge.save_megatron_model(model, path, config=config, store=store, **rest)


@contextlib.contextmanager
def _negated(model: Sequence[torch.nn.Module]) -> Iterator[None]:
    import torch

    def negate() -> None:
        with torch.no_grad():
            for chunk in model:
                for parameter in chunk.parameters():
                    parameter.neg_()

    negate()
    try:
        yield
    finally:
        negate()


@contextlib.contextmanager
def _resized(model: Sequence[Any], name: str, rows: int) -> Iterator[None]:
    import torch

    parameter = model[0].get_parameter(name)
    data = parameter.data
    parameter.data = torch.zeros(rows, *data.shape[1:], dtype=data.dtype)
    try:
        yield
    finally:
        parameter.data = data


def _slow_down(root: str, iteration: int, seconds: float) -> None:
    """Let each write to the files of one save take a while, from now on."""
    import shardway.live.writer as writer

    real = writer._Output.put

    def put(output: Any, views: Any) -> None:
        if str(output._path).startswith(f"{root}/.iter_{iteration:07d}"):
            time.sleep(seconds)
        real(output, views)

    mock.patch.object(writer._Output, "put", put).start()


def _store(kind: str | None, folder: Path) -> Any:
    import torch.distributed

    dist: Any = torch.distributed
    if kind in (None, "file"):
        return kind
    if kind == "hash":
        return dist.HashStore()
    store = dist.FileStore(str(folder / f"own_{kind}"), -1)
    if kind == "filestore":
        return store
    if kind == "prefix":
        return dist.PrefixStore("a/b", dist.PrefixStore("c", store))
    raise ValueError(kind)


@contextlib.contextmanager
def _fault(
    mark: Path,
    root: str,
    *,
    rank: Any,
    at: str,
    do: str,
    after: int = 0,
    seconds: float = 0.0,
) -> Iterator[None]:
    """Let something go wrong on this rank.

    Args:
        mark: A file that says that it has happened.
        root: Where is being saved to.
        rank: Which rank.
        at: ``os.pwritev`` and the like; ``prepare``, ``write``, ``publish``, ``finish`` or ``tracker`` for a step of
            the save; ``store`` for any call to the job's store; ``time`` for so many `seconds` after the call.
        do: ``kill`` or ``kill after``, ``sleep``, ``vanish`` (the staging folder is removed), or the name of an errno.
        after: How many calls go well before.
        seconds: How long to sleep, each time.
    """
    import torch.distributed as dist

    import shardway.live.folder as steps

    owner: Any
    name = at
    if at == "time":
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        yield
        return
    if at.startswith("os."):
        owner, name = os, at[3:]
    elif at == "tracker":
        owner, name = steps, "publish_tracker"
    elif at == "store":
        owner, name = dist.distributed_c10d.PrefixStore, "compare_set"
    else:
        owner = steps.IterationFolder
    real = getattr(owner, name)
    calls = 0

    def instead(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if at == "os.open" and ".distcp" not in str(args[0]):
            return real(*args, **kwargs)
        calls += 1
        if calls <= after:
            return real(*args, **kwargs)
        mark.touch()
        if do == "sleep":
            time.sleep(seconds)
        elif do == "vanish":
            for staging in Path(root).glob(".iter*"):
                staging.rename(f"{mark}.{time.monotonic_ns()}")  # at once, whoever is writing there
        elif do == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif do == "kill after":
            real(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            number = getattr(errno, do)
            raise OSError(number, os.strerror(number), str(args[0]) if at == "os.open" else None)
        return real(*args, **kwargs)

    with mock.patch.object(owner, name, instead):
        yield


if __name__ == "__main__":
    _serve()
