"""Reads iteration folders with Megatron-Core's own reader, and prints the first bytes of every tensor as JSON."""

from __future__ import annotations

import json
import sys
import warnings


def main() -> None:
    import torch
    import torch.distributed as dist

    warnings.simplefilter("ignore")
    from megatron.core import dist_checkpointing

    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
    for folder in sys.stdin.read().splitlines():
        if not dist_checkpointing.check_is_distributed_checkpoint(folder):
            raise SystemExit(f"{folder} is not a checkpoint to Megatron-Core")
        found = {}
        for key, tensor in dist_checkpointing.load_plain_tensors(folder).items():
            if isinstance(tensor, torch.Tensor):
                found[key] = tensor.contiguous().view(torch.uint8).numpy().tobytes().hex()[:64]
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
