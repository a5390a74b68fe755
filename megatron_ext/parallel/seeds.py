"""Random numbers as a function of the step, so that a resume needs no generator states and cannot get them wrong.

Ranks of one tensor-parallel group must drop the same elements of what they share, and different ones of what they split: megatron-core
keeps two streams for that. Data-parallel ranks and pipeline stages draw independently.
"""
import hashlib

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed


def seed_ranks(groups: ProcessGroupCollection, *, seed: int, step: int) -> None:
    """Seeds dropout for one step on this rank. Cheap on the CPU; on CUDA it restarts the device's generator."""
    digest = hashlib.sha256(f"{seed}/{step}/{groups.dp_cp.rank()}/{groups.pp.rank()}".encode()).digest()
    model_parallel_cuda_manual_seed(int.from_bytes(digest[:6], "little"), tp_rank=groups.tp.rank(), ep_rank=0, etp_rank=groups.tp.rank())
