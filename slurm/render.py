"""Writes the examples of this folder: stage.sbatch, sweep.sbatch and chain/. Run it after megatron_ext/submit has changed; a test compares.

    python slurm/render.py          writes them
    python slurm/render.py --check  says which are out of date
"""
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
ROOT = "/shared/megatron-ext"  # where a cluster may have the checkout
SITE = ("cluster=slurm_gpu", "cluster.partition=gpu", "cluster.account=my_project", "cluster.python=.venv/bin/python",
        "cluster.env=[NCCL_DEBUG=WARN,NCCL_SOCKET_IFNAME=ib0]")
STAGE = (*SITE, "cluster.nodes=4", "stage=pretrain", "data.paths=[data/tokens]", "model=llama3_8b", "precision=bf16", "parallel.tp=4", "parallel.sp=true",
         "data.sequence_length=8192", "train.tokens=100000000000", "train.global_batch_size=256", "train.micro_batch_size=1",
         "checkpoint.every=500", "run.dir=runs/llama3_8b")
SWEEP = (*SITE, "cluster.array_limit=4", "stage=pretrain", "data.paths=[data/tokens]", "model=llama32_1b", "precision=bf16", "train.tokens=2000000000",
         "train.global_batch_size=512", "train.micro_batch_size=8", "checkpoint.every=500", "run.dir=runs/sweep")
CHAIN = (*SITE, "cluster.nodes=2", "input=corpus.jsonl.zst", "output=tokens", "model=llama32_1b", "precision=bf16", "parallel=single", "train.micro_batch_size=4",
         "train.global_batch_size=256", "checkpoint.every=500", "pretrain:train.tokens=20000000000",
         "pretrain:optim.warmup_steps=500", "run.stages=[pretrain,sft,reward,ppo]", "run.dir=runs/llama32_1b")


def texts() -> dict[str, str]:
    """File name -> what it has to hold."""
    from types import SimpleNamespace

    from megatron_ext.submit import plan, render

    before, found = Path.cwd(), {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            Path("corpus.jsonl.zst").touch()
            Path("data/tokens").mkdir(parents=True)

            def jobs(*words: str, sweeps: tuple[str, ...] = ()):
                return plan.jobs(SimpleNamespace(overrides=words, sweeps=sweeps))

            found["stage.sbatch"] = render.script(*jobs(*STAGE))
            found["sweep.sbatch"] = render.script(*jobs(*SWEEP, sweeps=("optim.lr=1e-3,6e-4,3e-4", "train.seed=1,2")))
            chain = jobs("run", *CHAIN)
            found |= {f"chain/{job.name}.sbatch": render.script(job) for job in chain} | {"chain/submit.sh": render.submission(chain)}
        finally:
            os.chdir(before)
        return {name: text.replace(str(Path(folder).resolve()), ROOT) for name, text in found.items()}


def main() -> int:
    """0; with --check 1 where a file is out of date."""
    stale = {name: text for name, text in texts().items() if not (HERE / name).exists() or (HERE / name).read_text(encoding="utf-8") != text}
    for name, text in stale.items():
        print(name)
        if "--check" not in sys.argv[1:]:
            (HERE / name).parent.mkdir(exist_ok=True)
            (HERE / name).write_text(text, encoding="utf-8")
            (HERE / name).chmod(0o755)
    return 1 if stale and "--check" in sys.argv[1:] else 0


if __name__ == "__main__":
    sys.exit(main())
