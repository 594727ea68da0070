"""megatron-core's hybrid models on a CPU: its gated delta nets and Mamba mixers, with what they ask of CUDA replaced.

Used by tests/megatron.py in processes of their own, which have made the other replacements. The modules are
megatron-core's; what stands in is their norms and the scan of the state space, written from its definition.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping


def with_delta_nets(spec: Any, config: Any) -> Any:
    """Put gated delta nets into layers of megatron-core's own; there is a spec for Transformer Engine alone.

    The module computes with torch alone in its deterministic mode, but for one norm, for which it asks fla.
    """
    from megatron.core.ssm import gated_delta_net
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    def l2norm(heads: torch.Tensor) -> torch.Tensor:
        return heads * torch.rsqrt(heads.square().sum(-1, keepdim=True) + 1e-6)

    mock.patch.object(gated_delta_net, "HAVE_FLA", new=True).start()
    mock.patch.object(gated_delta_net, "l2norm", l2norm, create=True).start()
    config.deterministic_mode = True
    submodules = gated_delta_net.GatedDeltaNetSubmodules(
        in_proj=ColumnParallelLinear, out_norm=WrappedTorchNorm, out_proj=RowParallelLinear
    )
    layers = []
    for layer, is_delta in zip(spec.layer_specs, config.linear_attention_freq, strict=True):
        changed = copy.deepcopy(layer)
        if is_delta:
            changed.submodules.self_attention = ModuleSpec(module=gated_delta_net.GatedDeltaNet, submodules=submodules)
            changed.submodules.sharded_state_dict_keys_map = {
                **changed.submodules.sharded_state_dict_keys_map,
                "input_layernorm.": "self_attention.in_proj.layer_norm_",
            }
        layers.append(changed)
    return dataclasses.replace(spec, layer_specs=layers)


def mamba_model(config: Any, pattern: str, arguments: Mapping[str, Any]) -> Any:
    """megatron-core's MambaModel, its layers with norms apart from their linear layers."""
    _stand_in_for_kernels()
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.models.mamba import MambaModel
    from megatron.core.ssm import mamba_block, mamba_mixer
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.moe import moe_layer
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    mock.patch.object(mamba_mixer, "get_cuda_rng_tracker", mock.MagicMock()).start()
    mock.patch.object(mamba_block, "TENorm", WrappedTorchNorm).start()
    mock.patch.object(moe_layer, "HAVE_TE", new=True).start()
    mock.patch.object(moe_layer, "TELinear", Duplicated, create=True).start()
    mixer = mamba_mixer.MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear, core_attention=DotProductAttention, linear_proj=RowParallelLinear
    )
    mlp = ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )
    moe = get_moe_module_spec(use_te=False, num_experts=config.num_moe_experts or 1, moe_grouped_gemm=False)
    causal = {"attn_mask_type": AttnMaskType.causal}
    spec = ModuleSpec(
        module=mamba_block.MambaStack,
        submodules=mamba_block.MambaStackSubmodules(
            mamba_layer=ModuleSpec(
                module=MambaLayer,
                submodules=MambaLayerSubmodules(
                    norm=WrappedTorchNorm,
                    mixer=ModuleSpec(module=mamba_mixer.MambaMixer, submodules=mixer),
                    mamba_bda=get_bias_dropout_add,
                ),
            ),
            attention_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    input_layernorm=WrappedTorchNorm,
                    self_attention=ModuleSpec(module=SelfAttention, params=causal, submodules=attention),
                    self_attn_bda=get_bias_dropout_add,
                ),
            ),
            mlp_layer=ModuleSpec(
                module=MLPLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=WrappedTorchNorm, mlp=mlp, mlp_bda=get_bias_dropout_add
                ),
            ),
            moe_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=WrappedTorchNorm, mlp=moe, mlp_bda=get_bias_dropout_add
                ),
            ),
        ),
    )
    return MambaModel(config, spec, hybrid_override_pattern=pattern, parallel_output=False, **arguments)


def _stand_in_for_kernels() -> None:
    """Let the module of Mamba mixers be imported, which asks for triton, einops and mamba_ssm."""
    tensor_ops = ("tensor_get_slice_after", "tensor_masked_update", "tensor_merge")
    modules: dict[str, dict[str, Any]] = {
        "megatron.core.inference.contexts.attention_context.triton.tensor_ops": dict.fromkeys(tensor_ops),
        "einops": {"rearrange": rearrange, "repeat": None},
        "mamba_ssm": {},
        "mamba_ssm.ops": {},
        "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.triton.layernorm_gated": {"RMSNorm": GroupedRMSNorm},
        "mamba_ssm.ops.triton.ssd_combined": {
            "mamba_chunk_scan_combined": None,
            "mamba_split_conv1d_scan_combined": split_scan,
        },
    }
    for name, content in modules.items():
        if name not in sys.modules:
            sys.modules[name] = ModuleType(name)
            vars(sys.modules[name]).update(content)


def rearrange(tensor: torch.Tensor, pattern: str) -> torch.Tensor:
    """What a training step asks of einops."""
    if pattern == "d 1 w -> d w":
        return tensor.squeeze(1)
    if pattern in ("l b d -> b l d", "b l d -> l b d"):
        return tensor.transpose(0, 1)
    raise ValueError(pattern)


class Duplicated(torch.nn.Linear):
    """Transformer Engine's linear layer that every rank has whole, which projects to where latent experts work."""

    def __init__(self, input_size: int, output_size: int, **_: Any) -> None:
        super().__init__(input_size, output_size, bias=False)

    def forward(self, hidden: torch.Tensor) -> Any:
        return super().forward(hidden), None


class GroupedRMSNorm(torch.nn.Module):
    """mamba_ssm's norm of groups of a token's values."""

    def __init__(self, hidden_size: int, *, eps: float, group_size: int, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.eps, self.group_size = eps, group_size

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        groups = hidden.reshape(*hidden.shape[:-1], -1, self.group_size)
        return torch.nn.functional.rms_norm(groups, (self.group_size,), None, self.eps).flatten(-2) * self.weight


def split_scan(
    projected: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor,
    dt_bias: torch.Tensor,
    decay: torch.Tensor,
    *,
    D: torch.Tensor,  # noqa: N803
    headdim: int,
    ngroups: int,
    **_: Any,
) -> torch.Tensor:
    """What mamba_ssm's kernel of this name computes, token by token: Mamba 2 by its definition."""
    functional = torch.nn.functional
    heads, channels = len(decay), len(conv_weight)
    inner = heads * headdim
    z, convolved, dt = torch.split(projected, [inner, channels, heads], dim=-1)
    padded = functional.pad(convolved.transpose(1, 2), (conv_weight.shape[1] - 1, 0))
    convolved = functional.silu(functional.conv1d(padded, conv_weight[:, None], conv_bias, groups=channels))
    x, b, c = torch.split(convolved.transpose(1, 2), [inner, (channels - inner) // 2, (channels - inner) // 2], dim=-1)
    x = x.reshape(*x.shape[:2], heads, headdim)
    b, c = (each.reshape(*each.shape[:2], ngroups, -1).repeat_interleave(heads // ngroups, dim=2) for each in (b, c))
    dt = functional.softplus(dt + dt_bias)
    state = torch.zeros(*x.shape[:1], heads, headdim, b.shape[-1])
    seen = []
    for token in range(x.shape[1]):
        step = dt[:, token, :, None]
        state = state * torch.exp(step * decay[:, None])[..., None]
        state = state + (step * x[:, token])[..., None] * b[:, token, :, None]
        seen.append((state * c[:, token, :, None]).sum(-1) + D[:, None] * x[:, token])
    return torch.stack(seen, dim=1).flatten(-2) * functional.silu(z)
