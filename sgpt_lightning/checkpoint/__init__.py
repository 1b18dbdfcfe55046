"""A compressed model on disk: save and load it, or any other model."""
