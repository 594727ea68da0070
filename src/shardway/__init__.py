"""shardway: the way for model weights between Hugging Face (safetensors) and Megatron-Core (torch_dist)."""

__version__ = "0.1.0"
