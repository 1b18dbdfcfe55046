"""Tensors in, tensors out: statistics, masks, grids and the solve of one linear. Torch only."""
