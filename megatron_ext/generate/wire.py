"""What the ranks of one model replica tell each other while they generate.

    stage i  --hidden states-->  stage i + 1  ...  last stage: logits gathered on its first tensor-parallel rank, the sampler
    sampler  --tokens drawn, which rows go on-->  all ranks of the replica

One rank draws and the others take its word: ranks that each drew for themselves could disagree by one rounding, and would then wait for
each other for ever.
"""
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.train.engine import Engine


class Wire:
    """The groups of one replica (tensor and pipeline ranks with the same data rank). Attributes: `sampler`, whether this rank draws."""

    def __init__(self, engine: Engine):
        groups = engine.groups
        self.device, self.vocab_size = engine.platform.device, engine.vocab_size
        self._tp, self._replica = groups.tp, groups.mp
        stages, stage = dist.get_process_group_ranks(groups.pp), groups.pp.rank()
        self._before = stages[stage - 1] if stage > 0 else None
        self._behind = stages[stage + 1] if stage + 1 < len(stages) else None
        self._pp = groups.pp
        tensor_ranks = dist.get_process_group_ranks(groups.tp)
        self._tp_first = tensor_ranks[0]
        replica = dist.get_process_group_ranks(groups.mp)
        self._source = replica[len(replica) - len(tensor_ranks)]  # ranks ascend with tensor ranks fastest: the first of the last stage
        self.sampler = dist.get_rank() == self._source
        self._sending: list[tuple[dist.Work, Tensor]] = []

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The hidden states of the stage before."""
        hidden = torch.empty(shape, dtype=dtype, device=self.device)
        dist.recv(hidden, self._before, group=self._pp)
        return hidden

    def send(self, hidden: Tensor) -> None:
        """Hands hidden states to the next stage without waiting for it."""
        hidden = hidden.contiguous()
        self._keep(dist.isend(hidden, self._behind, group=self._pp), hidden)

    def logits(self, columns: Tensor) -> Tensor | None:
        """On the sampler all words' logits, fp32 [rows, words], from each tensor-parallel rank's columns; elsewhere None."""
        if self._tp.size() > 1:
            columns = columns.contiguous()
            parts = [torch.empty_like(columns) for _ in range(self._tp.size())] if self.sampler else None
            dist.gather(columns, parts, dst=self._tp_first, group=self._tp)
            columns = torch.cat(parts, dim=-1) if self.sampler else columns
        return columns[:, : self.vocab_size].float() if self.sampler else None

    def tell(self, packet: Tensor) -> None:
        """The sampler's word to all, int64 [2, rows]: tokens, and 1 for rows that go on. Does not wait for them."""
        if self._replica.size() > 1:
            packet = packet.to(self.device)
            self._keep(dist.broadcast(packet, self._source, group=self._replica, async_op=True), packet)

    def hear(self, rows: int) -> Tensor:
        """What the sampler told, on the others; on the CPU."""
        packet = torch.empty(2, rows, dtype=torch.int64, device=self.device)
        dist.broadcast(packet, self._source, group=self._replica)
        return packet.cpu()

    def settle(self) -> None:
        """Waits for all that was sent."""
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()

    def share(self, value: object) -> object:
        """The sampler's object, on every rank of the replica."""
        if self._replica.size() == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, self._source, group=self._replica, device=self.device)
        return box[0]

    def _keep(self, work: dist.Work, tensor: Tensor) -> None:
        """Memory that is being sent must stay as it is until it has arrived."""
        self._sending = [(other, kept) for other, kept in self._sending if not other.is_completed()]
        self._sending.append((work, tensor))
