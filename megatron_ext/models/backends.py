"""Whether the backends that a run asks for can serve here: looked at once, before a model is built."""
from dataclasses import asdict

from kernels import backend
from megatron_ext.config.schema import KernelsConfig, PrecisionConfig
from megatron_ext.errors import UserError


def check_backends(kernels: KernelsConfig, precision: PrecisionConfig, device: str) -> None:
    """Raises UserError for the first op of `kernels` whose backend is unknown or cannot serve on `device` ("cuda", "cpu")."""
    for op, asked in asdict(kernels).items():
        if op == "layers":
            continue
        needed = "fp8_linear_blockwise" if op == "fp8_linear" and precision.fp8 == "blockwise" else op
        try:
            backend.choose(needed, asked, device=device)
        except backend.MissingBackend as error:
            install = f"; install it with: {error.install}" if error.install else ""
            raise UserError(f"kernels.{op}", asked, f"{error.reason}{install}") from None
