"""`python -m megatron_ext VERB [overrides] [--options]`."""
import sys

from megatron_ext.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
