"""Triton: loops over the columns of a tile, and streams of codes decoded; imports nothing of ours."""
