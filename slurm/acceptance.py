"""First contact with a cluster: does what is installed here compute right? See megatron_ext/contact/acceptance.py.

    python slurm/acceptance.py --ranks 2            on this machine
    sbatch slurm/acceptance.sbatch                  on a cluster
"""
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    top = str(Path(__file__).resolve().parent.parent)
    sys.path[0] = top  # without an installation too
    os.environ["PYTHONPATH"] = os.pathsep.join([top, *filter(None, [os.environ.get("PYTHONPATH")])])  # of the ranks
    from megatron_ext.contact.acceptance import main

    sys.exit(main(sys.argv[1:]))
