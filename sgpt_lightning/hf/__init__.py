"""transformers reads and writes our directories by itself."""
