"""Quality: an n-gram language model, heuristics of Gopher and C4 for Korean, repetition, word lists, duplicates, decontamination. Each
part works on `str`."""
