"""AutoBridge: the calls that users of Megatron Bridge know."""
