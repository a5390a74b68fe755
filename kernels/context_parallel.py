"""Context parallelism: attention of sequences that are split over ranks, in zig-zag order.

`ring_attention`: keys and values travel; any number of heads. `ulysses_attention`: heads are exchanged for tokens; heads divide by the ranks.
Both give what `kernels.attention` gives on one rank, dense and packed. The `zigzag_` functions say which tokens a rank holds.
"""
from kernels.ring_attention import ring_attention
from kernels.ulysses_attention import ulysses_attention
from kernels.zigzag import zigzag_join, zigzag_packed_positions, zigzag_positions, zigzag_split

__all__ = ["ring_attention", "ulysses_attention", "zigzag_join", "zigzag_packed_positions", "zigzag_positions", "zigzag_split"]
