"""The `shardway` command.

argparse rather than a richer library: it starts in 8 ms where click takes 27 ms and typer more, and every command
here is one call of the Python API. Each command imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import os
import sys

from shardway import __version__

TYPE_CHECKING = False  # typing itself would take a tenth of the command's start-up

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

_M_MMAP_THRESHOLD = -3  # of malloc.h
_LARGE_BLOCK_BYTES = 2**18
_EPILOG = """\
examples:
  shardway import ./Llama-3.1-8B ./ckpt            Hugging Face -> Megatron, ./ckpt/iter_0000000
  shardway export ./ckpt ./Llama-again             and back
  shardway verify ./Llama-3.1-8B ./ckpt            bit for bit, any pair of checkpoints
  shardway verify ./ckpt                           every byte as it was written?
  shardway inspect ./ckpt --tensors

exit status: 0 success, 1 an error or a difference (the message says what), 2 wrong usage, 130 interrupted
"""


def program() -> NoReturn:
    """The whole process: run the command, and exit with its status.

    The interpreter isn't taken apart first, which would take some 50 ms to free memory one piece after the other.
    """
    status = main()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # closed before the command began
                stream.flush()
        except BrokenPipeError:  # nobody reads any more
            status = status or 1
        except OSError as error:
            print(f"shardway: could not write all of the output: {error.strerror}", file=sys.stderr)
            status = status or 1
    os._exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = build_parser()
    chosen = parser.parse_args(arguments)
    if chosen.command is None:
        parser.print_help()
        return 0
    # numpy, where it is needed, would start a thread for each processor, to multiply matrices; nothing here does.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    _give_back_large_blocks()
    from shardway.cli import commands
    from shardway.core.errors import ShardwayError

    try:
        return commands.run(chosen)
    except ShardwayError as error:
        commands.print_error(error, as_json=getattr(chosen, "json", False))
        return 1
    except KeyboardInterrupt:
        print("shardway: interrupted; nothing was published", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1


def _give_back_large_blocks() -> None:
    """Have the C library return large blocks of memory to the system when they are freed, unless told otherwise.

    Once glibc has seen blocks of up to 32 MB freed, it takes such from where small ones lie, and what was in their
    place can't be returned: a tenth of the memory of a plan of 50,000 tensors.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    import ctypes

    try:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)
    except (AttributeError, OSError):  # another C library
        return


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="shardway",
        description="Move model weights between Hugging Face (safetensors) and Megatron-Core (torch_dist) checkpoints.",
        epilog=_EPILOG,
        formatter_class=_formatter,
    )
    parser.add_argument("--version", action="version", version=f"shardway {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    command = _command(commands, "import", "Hugging Face directory -> Megatron checkpoint")
    command.add_argument(
        "source", metavar="SRC", help="directory with config.json and *.safetensors, or org/name on the Hub"
    )
    command.add_argument("destination", metavar="DST", help="root of the Megatron checkpoint to write")
    _add_dtype(command)
    _add_layout(command)
    command.add_argument(
        "--spec",
        choices=("te", "local"),
        default="te",
        help="names of norms as Transformer Engine's layers have them (default), or megatron-core's own",
    )
    command.add_argument(
        "--for",
        dest="target",
        choices=("megatron-bridge", "megatron-lm"),
        default="megatron-bridge",
        help="whose config to write along: run_config.yaml (default), or the arguments that Megatron-LM reads",
    )
    command.add_argument(
        "--bridge-version",
        choices=("0.7.0", "0.3.1"),
        default="0.7.0",
        help="which Megatron Bridge run_config.yaml is for (default: 0.7.0)",
    )
    which = command.add_mutually_exclusive_group()
    which.add_argument("--iteration", type=int, default=0, metavar="N", help="number of the iteration (default: 0)")
    which.add_argument("--release", action="store_true", help="write release/ instead of an iteration")
    _add_revision(command)
    command.add_argument(
        "--no-keep-source",
        action="store_true",
        help="of what is fetched from the Hub, keep two files at a time and none in the end",
    )
    _add_running(command)
    command.add_argument("--max-file-size", default="4GiB", metavar="SIZE", help="largest .distcp file (default: 4GiB)")
    _add_chunk_for(command, "one for each layer and expert")
    _add_output(command)

    command = _command(commands, "export", "Megatron checkpoint -> Hugging Face directory")
    command.add_argument("source", metavar="SRC", help="root (the tracker decides) or an iteration folder")
    command.add_argument("destination", metavar="DST", help="Hugging Face directory to write")
    _add_hf(command)
    _add_dtype(command)
    _add_weights(command)
    _add_quantize(command)
    _add_running(command)
    _add_shard_size(command)
    command.add_argument("--push", metavar="ORG/NAME", help="then upload DST to this repository on the Hub")
    command.add_argument("--private", action="store_true", help="make the repository a private one, if it is made")
    command.add_argument("--revision", metavar="BRANCH", help="push to this branch (default: main)")
    _add_output(command)

    command = _command(commands, "migrate", "Megatron checkpoint -> the same for another version, layout or job")
    command.add_argument("source", metavar="SRC", help="root (the tracker decides) or an iteration folder")
    command.add_argument("destination", metavar="DST", help="root of the Megatron checkpoint to write")
    command.add_argument(
        "--to",
        choices=("mcore-0.16", "mcore-0.20"),
        default="mcore-0.16",
        help="common.pt, which every megatron-core reads (default), or common_state, as 0.19 and later write",
    )
    command.add_argument(
        "--layout",
        choices=("auto", "stacked", "per-layer"),
        default="auto",
        help="layers stacked on a leading axis, or one key each (default: as they are)",
    )
    _add_chunk_for(command, "as they are")
    _add_running(command)
    command.add_argument("--max-file-size", default="4GiB", metavar="SIZE", help="largest .distcp file (default: 4GiB)")
    _add_output(command)

    command = _command(commands, "verify", "compare two checkpoints bit for bit, or check one against its record")
    command.add_argument("a", metavar="A", help="Hugging Face directory, or Megatron root or iteration folder")
    command.add_argument("b", metavar="B", nargs="?", help="likewise; without it A is held against its own digests")
    _add_revision(command)
    _add_workers(command)
    _add_output(command)

    command = _command(commands, "inspect", "what a checkpoint is and holds")
    command.add_argument("path", metavar="PATH", help="Hugging Face directory, or Megatron root or iteration folder")
    command.add_argument("--tensors", action="store_true", help="list every tensor")
    command.add_argument("--digest", action="store_true", help="read every tensor and give its sha256")
    _add_revision(command)
    _add_workers(command)
    _add_output(command)

    command = _command(commands, "plan", "what an import or export would read and write; writes nothing")
    command.add_argument("source", metavar="SRC", help="Hugging Face directory, or Megatron root or iteration folder")
    _add_revision(command)
    _add_hf(command)
    _add_dtype(command)
    _add_weights(command)
    _add_quantize(command)
    _add_layout(command)
    command.add_argument("--max-file-size", default="4GiB", metavar="SIZE", help="largest .distcp file (default: 4GiB)")
    _add_chunk_for(command, "one for each layer and expert")
    _add_shard_size(command)
    _add_output(command)

    command = _command(commands, "clean", "remove what killed runs have left of a destination; never a checkpoint")
    command.add_argument("path", metavar="PATH", help="a destination of import, export or a live save, there or not")
    _add_output(command)

    command = _command(commands, "families", "the architectures that are supported")
    command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, summary: str
) -> argparse.ArgumentParser:
    description = summary[0].upper() + summary[1:] + "."
    return commands.add_parser(name, help=summary, description=description, formatter_class=_formatter)


def _formatter(prog: str) -> argparse.HelpFormatter:
    """Help as wide as the terminal; asking for its width here keeps argparse from importing shutil for it."""
    try:
        columns = int(os.environ.get("COLUMNS", "")) or 80
    except ValueError:
        try:
            columns = os.get_terminal_size(sys.__stdout__.fileno() if sys.__stdout__ else 1).columns
        except (OSError, ValueError):
            columns = 80
    return argparse.RawDescriptionHelpFormatter(prog, width=max(40, columns - 2))


def _add_dtype(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dtype",
        choices=("auto", "bf16", "fp16", "fp32"),
        default="auto",
        help="auto keeps every tensor's bits (default); the others cast floating-point tensors",
    )


def _add_layout(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--layout",
        choices=("auto", "stacked", "per-layer"),
        default="auto",
        help="layers stacked on a leading axis, or one key each (default: what Megatron expects)",
    )


def _add_revision(command: argparse.ArgumentParser) -> None:
    command.add_argument("--revision", metavar="R", help="branch, tag or commit of a repository on the Hub")


def _add_hf(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--hf", metavar="DIR", help="directory with config.json and tokenizer (default: hf/ inside the checkpoint)"
    )


def _add_quantize(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--quantize",
        choices=("fp8-block",),
        help="quantise again what came from FP8 blocks (default: write it plainly)",
    )


def _add_chunk_for(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument(
        "--chunk-for",
        default="",
        metavar="JOB",
        help=f"cut chunks along the shards of a job, such as tp=8,ep=8 (default: {default})",
    )


def _add_weights(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--weights",
        choices=("model", "fp32"),
        default="model",
        help="the model's own weights (default), or the float32 copies that the optimizer trains",
    )


def _add_shard_size(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--max-shard-size",
        default="auto",
        metavar="SIZE",
        help="most tensor bytes in a safetensors file (default: 5GB, less for small models)",
    )


def _add_running(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--if-exists",
        choices=("error", "reuse", "replace"),
        default="error",
        help="what to do with a destination that is there already (default: error)",
    )
    _add_workers(command)
    command.add_argument(
        "--no-fsync", action="store_true", help="don't force data to the device before it is published"
    )
    command.add_argument("--verify", action="store_true", help="read the result back and compare before publishing")


def _add_workers(command: argparse.ArgumentParser) -> None:
    command.add_argument("--workers", type=int, metavar="N", help="threads (default: one per processor, at most 16)")


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--quiet", action="store_true", help="print nothing but errors")
    command.add_argument("--json", action="store_true", help="print the report as JSON on standard output")


if __name__ == "__main__":
    sys.exit(main())
