"""What a run writes and shows: metrics, events, a progress line, wandb, GPU figures, FLOPs and MFU, the report."""
