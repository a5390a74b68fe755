"""Taxonomy: which domain a text is of, or none of ours. A linear model over hashed character n-grams; it serves alone, with numpy."""
