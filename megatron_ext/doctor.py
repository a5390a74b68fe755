"""What is on this machine, what serves each op, and why not something better. Works with anything missing, torch included.

Packages are looked at through their metadata and files; only torch is imported. Two names mislead:
- `apex` on PyPI is not NVIDIA Apex. NVIDIA's is built from source and has the compiled extension `amp_C`.
- Hugging Face's `kernels` installs the folder that our own ops live in.
"""
import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIRED = ("torch", "megatron-core", "numpy", "einops", "psutil", "hydra-core", "tokenizers", "pyarrow", "zstandard", "tqdm", "matplotlib")
OPTIONAL = {  # what it is for, and how it comes
    "triton": ("fused kernels on a GPU", "pip install triton"),
    "transformer-engine": ("FP8 and fused layers", "pip install --no-build-isolation 'transformer-engine[pytorch]'"),
    "flash-attn": ("attention on a GPU", "pip install --no-build-isolation flash-attn"),
    "nvidia-ml-py": ("GPU figures in metrics.jsonl", "pip install nvidia-ml-py"),
    "wandb": ("log.wandb=offline|online", "pip install wandb"),
    "transformers": ("comparisons in tests and benchmarks", "pip install transformers"),
}
# No GPU has been at hand: what only one can run, beside the backends that say so of themselves (kernels/backend.py).
NEVER_RUN = (
    "kernels.layers=te: Transformer Engine's layers and recipes", "Triton kernels compiled on a GPU (interpreted and statically checked only)",
    "NCCL and collectives across GPUs", "torch._scaled_mm and FP8 on a GPU",
)


def version_of(distribution: str) -> str | None:
    """Installed version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _folder(module: str) -> Path | None:
    """Where a top-level package lies, without importing it."""
    spec = importlib.util.find_spec(module)
    locations = list(spec.submodule_search_locations or ()) if spec else []
    return Path(locations[0]) if locations else None


def apex() -> dict[str, object]:
    """Which `apex` this is: `found` is "nvidia", "nvidia without extensions", "unrelated" or None, and `note` says what that means."""
    folder = _folder("apex")
    if folder is None:
        return {"found": None, "note": "not installed; NVIDIA Apex is built from source (github.com/NVIDIA/apex), it is not on PyPI"}
    if not (folder / "optimizers" / "fused_adam.py").is_file():
        return {"found": "unrelated", "note": f"the package 'apex' {version_of('apex') or ''} in {folder.parent} is the unrelated one of that name"
                                              " on PyPI, not NVIDIA Apex; it is not used. Remove it: pip uninstall apex"}
    if importlib.util.find_spec("amp_C") is None:
        return {"found": "nvidia without extensions", "note": "NVIDIA Apex without its compiled extension amp_C: not used; build it with "
                                                              "APEX_CPP_EXT=1 APEX_CUDA_EXT=1"}
    return {"found": "nvidia", "note": f"NVIDIA Apex with its compiled extensions, in {folder}"}


def kernels_collision(root: Path = ROOT) -> str | None:
    """What is wrong with the name `kernels` here, and what to do; None when it is our folder and nobody else claims it."""
    remedy = f"remove it from this environment: {sys.executable} -m pip uninstall kernels, then: make setup"
    if version_of("kernels") is not None:
        return f"Hugging Face's package 'kernels' {version_of('kernels')} installs the folder of our ops; {remedy}"
    folder = _folder("kernels")
    if folder is None:
        return f"our folder 'kernels' is not on the path; install the project: {sys.executable} -m pip install -e {root}"
    if not (folder / "backend.py").is_file():
        return f"'kernels' is {folder}, which is not this project's; {remedy}"
    return None


def torch_facts() -> dict[str, object]:
    """Version, device and threads as torch sees them; `error` where it is missing or broken."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"version": version_of("torch"), "error": f"torch does not import ({error}); run: make setup"}
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    found: dict[str, object] = {"version": torch.__version__, "build": built, "threads": torch.get_num_threads(), "gpus": []}
    if torch.version.cuda and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            what = torch.cuda.get_device_properties(index)
            found["gpus"].append({"name": what.name, "compute_capability": f"{what.major}.{what.minor}", "memory_bytes": what.total_memory})
    return found


def runs_on(torch: dict[str, object]) -> dict[str, str]:
    """Device and collectives that a run would take, and why."""
    if "error" in torch:
        return {"device": "none", "backend": "none", "reason": "torch is missing"}
    if torch["gpus"]:
        return {"device": "cuda", "backend": "nccl", "reason": f"torch sees {len(torch['gpus'])} GPU(s)"}
    why = "this torch is built without CUDA" if torch["build"] == "CPU only" else "torch has CUDA but sees no GPU"
    return {"device": "cpu", "backend": "gloo", "reason": why}


def ops() -> list[dict[str, object]]:
    """For each op of `kernels/`: its backend, why, and why not the others."""
    collision = kernels_collision()
    if collision is not None:
        return [{"op": "all", "backend": "none", "reason": collision, "why_not": {}}]
    from kernels import backend

    found = []
    for op in backend.ops():
        try:
            choice = backend.choose(op)
            found.append({"op": op, "backend": choice.backend, "reason": choice.reason, "why_not": dict(choice.alternatives)})
        except (backend.MissingBackend, ImportError) as error:
            found.append({"op": op, "backend": "none", "reason": str(error), "why_not": {}})
    return found


def not_executed() -> list[str]:
    """Code paths that have never run anywhere, as "op: backend"; said so that nobody takes them for proven."""
    if kernels_collision() is not None:
        return []
    from kernels import backend

    return [*(f"{op}: {b.name}" for op, backends in backend.ops().items() for b in backends if not b.executed), *NEVER_RUN]


def examine() -> dict[str, object]:
    """Everything, JSON-able. `problems` lists what keeps a run from working; nothing optional is in it."""
    torch = torch_facts()
    packages = {name: version_of(name) for name in REQUIRED}
    missing = [name for name, version in packages.items() if version is None]
    problems = [f"not installed: {', '.join(missing)}; run: make setup"] if missing else []
    if packages["torch"] is not None and "error" in torch:
        problems.append(str(torch["error"]))
    if (collision := kernels_collision()) is not None:
        problems.append(collision)
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        problems.append(f"Python {platform.python_version()}: 3.11 to 3.13 are supported")
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": packages,
        "optional": {name: {"version": version_of(name), "for": what, "install": line} for name, (what, line) in OPTIONAL.items()},
        "apex": apex(),
        "torch": torch,
        "runs_on": runs_on(torch),
        "ops": ops(),
        "not_executed": not_executed(),
        "problems": problems,
    }


def text(found: dict[str, object]) -> str:
    """`examine()` for people."""
    torch, device = found["torch"], found["runs_on"]
    lines = [
        f"python      {found['python']} ({found['executable']})",
        f"system      {found['system']}, {found['cores']} cores",
        "packages    " + ", ".join(f"{name} {version or 'MISSING'}" for name, version in found["packages"].items()),
        f"torch       {torch.get('error') or torch['version'] + ', ' + torch['build'] + ', ' + str(torch['threads']) + ' threads'}",
        *(f"gpu         {gpu['name']}, compute capability {gpu['compute_capability']}, {gpu['memory_bytes'] / 2**30:.0f} GiB"
          for gpu in torch.get("gpus", ())),
        f"runs on     {device['device']} with {device['backend']}: {device['reason']}",
        "",
        "ops",
    ]
    for op in found["ops"]:
        lines.append(f"  {op['op']:<22}{op['backend']}: {op['reason']}")
        lines += [f"  {'':<22}not {name}: {why}" for name, why in op["why_not"].items()]
    lines += ["", "written and not yet executed anywhere", *(f"  {path}" for path in found["not_executed"])]
    lines += ["", "optional"]
    for name, entry in found["optional"].items():
        state = entry["version"] or f"not installed: {entry['install']}"
        lines.append(f"  {name:<20}{entry['for']}: {state}")
    lines.append(f"  {'apex':<20}{found['apex']['note']}")
    lines += ["", *(f"problem: {problem}" for problem in found["problems"])] if found["problems"] else ["", "no problems found"]
    return "\n".join(lines)
