"""What runs in the other process: `python rlhf/rewards/confined` (see `__main__.py`). The standard library alone; nothing here is imported by the rest."""
