"""A compressed directory, written for other programs: plain transformers, compressed-tensors, one file of tensors."""
