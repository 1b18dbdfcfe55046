"""What bytes mean: packed weights, records, the manifest and the directory. No solver, no model."""
