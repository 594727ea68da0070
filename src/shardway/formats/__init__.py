"""File formats: safetensors and Hugging Face directories, torch zip containers and torch_dist directories."""
