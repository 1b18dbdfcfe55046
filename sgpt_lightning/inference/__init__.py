"""A compressed model at work: the text it writes beside the dense one's, and how fast it is."""
