"""What all tests share."""
import os

os.environ.setdefault("WANDB_MODE", "disabled")  # a second a run; tests/test_observe.py tests the tracker by itself
