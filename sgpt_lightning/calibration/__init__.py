"""Runs a model to gather statistics and solves its linears; knows nothing of Lightning."""
