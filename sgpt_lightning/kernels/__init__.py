"""Triton: loops over the columns of a tile, and streams of codes read and written; imports nothing of ours."""
