"""Studies: recipes on models, texts and seeds, as rows, tables and figures."""
