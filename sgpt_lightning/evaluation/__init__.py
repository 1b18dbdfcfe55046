"""Perplexity, and a model measured on windows."""
