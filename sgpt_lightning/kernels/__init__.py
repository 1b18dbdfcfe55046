"""Triton: loops over the columns of a tile, streams of codes, products with packed weights; imports nothing of ours."""
