"""Model families as data: rules that relate Hugging Face tensors to Megatron tensors, and how configs translate."""
