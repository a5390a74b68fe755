"""A rank's side of its writer process: memory that both share, and jobs sent without waiting for the answer.

The loop stands still only while tensors are copied into that memory (device to host on CUDA, into page-locked memory). It is kept
from save to save, because the first touch of fresh pages costs more than the copy; it is as large as what this rank writes.
"""
import json
import mmap
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from megatron_ext.checkpoint.manifest import ALIGNMENT

ROOT = Path(__file__).resolve().parents[2]


class SharedMemory:
    """Anonymous memory that grows, visible to a child by its file descriptor."""

    def __init__(self):
        if hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create("checkpoint", 0)
        else:  # not Linux
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())
        os.set_inheritable(self.descriptor, True)
        self.bytes = torch.empty(0, dtype=torch.uint8)
        self._pinned = False

    def reserve(self, size: int) -> None:
        """At least `size` bytes. Raises OSError when the machine has no memory left."""
        if size > self.bytes.numel():
            self._unpin()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self.descriptor, 0, size)  # fails here, not with SIGBUS at the first touch
            else:
                os.ftruncate(self.descriptor, size)
            self.bytes = torch.frombuffer(mmap.mmap(self.descriptor, size), dtype=torch.uint8)

    def fill(self, tensors: list[torch.Tensor], offsets: list[int]) -> None:
        """Copies each tensor, C-contiguous, to its byte offset; all device copies run before the one wait."""
        on_device = [tensor.is_cuda for tensor in tensors]
        if any(on_device):
            self._pin()
        for tensor, offset in zip(tensors, offsets):
            if tensor.numel():
                place = self.bytes[offset : offset + tensor.numel() * tensor.element_size()].view(tensor.dtype)
                place.view(tensor.shape).copy_(tensor, non_blocking=True)
        if any(on_device):
            torch.cuda.synchronize()

    def close(self) -> None:
        self._unpin()
        self.bytes = torch.empty(0, dtype=torch.uint8)
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _pin(self) -> None:
        if not self._pinned:  # page-locked: the copies run at bus speed and side by side
            self._pinned = torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), self.bytes.numel(), 0) == 0

    def _unpin(self) -> None:
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr())
            self._pinned = False


class Writer:
    """The writer process of this rank, started when it is first needed and again when it was killed. One job at a time."""

    def __init__(self):
        self.memory = SharedMemory()
        self._process: subprocess.Popen | None = None
        self._answer: dict | None = None
        self._received = b""

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self.stop()
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-m", "megatron_ext.checkpoint.writer", str(self.memory.descriptor), str(os.getpid())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, pass_fds=[self.memory.descriptor],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd="/",
        )  # fmt: skip

    def send(self, job: dict) -> None:
        """Starts a job. A process that is dead or dies meanwhile shows in the answer."""
        self._answer, self._received = None, b""
        try:
            self.start()
            line = json.dumps(job).encode() + b"\n"
            while line:  # a signal may cut an unbuffered write short
                line = line[self._process.stdin.write(line) :]
        except OSError as error:
            self._answer = {"error": f"the writer process cannot be reached: {error}"}

    def answer(self, *, wait: bool = False) -> dict | None:
        """The answer to the last job, None while it is being done. {"error": reason} when it failed or the process died."""
        while self._answer is None:
            ready = select.poll()  # select() refuses descriptors above 1,023, which a rank with many sockets has
            ready.register(self._process.stdout, select.POLLIN)
            if not ready.poll(None if wait else 0):
                return None
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            self._received += data
            if self._received.endswith(b"\n"):
                self._answer = json.loads(self._received)
            elif not data:
                code = self._process.wait()
                self._answer = {"error": f"the writer process died ({f'signal {-code}' if code < 0 else f'exit code {code}'})"}
        return self._answer

    def stop(self) -> None:
        """Ends the process after its current job."""
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                pipe.close()
            try:
                self._process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None


def offsets_of(tensors: list[torch.Tensor]) -> tuple[list[int], int]:
    """Aligned byte offsets for the tensors one after the other, and the end of the last."""
    offsets, end = [], 0
    for tensor in tensors:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        offsets.append(start)
        end = start + tensor.numel() * tensor.element_size()
    return offsets, end
