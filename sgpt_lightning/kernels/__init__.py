"""Triton: loops over the columns of a tile, one launch a tile; imports nothing of ours."""
