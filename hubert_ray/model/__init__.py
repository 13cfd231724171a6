"""The science of one HuBERT model: network, masks, losses, learning rates, foreign weights. Torch only, never Ray."""
