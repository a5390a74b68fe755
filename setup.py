"""Packages, pinned ranges and extras. `make setup` installs this into .venv (`.ci/environment` says how torch is chosen)."""
from setuptools import find_packages, setup

REQUIRES = [
    "torch>=2.9,<2.15",
    "megatron-core>=0.16.1,<0.20",
    "numpy>=1.26,<3",
    "einops>=0.8,<1",  # megatron-core needs it and does not say so
    "psutil>=5.9,<8",  # megatron-core 0.19 too, when it writes a checkpoint
    "hydra-core>=1.3.2,<1.4",
    "omegaconf>=2.3,<2.4",
    "PyYAML>=6,<7",
    "tokenizers>=0.20,<0.24",
    "jinja2>=3.1,<4",  # chat templates
    "pyarrow>=16,<27",
    "zstandard>=0.22,<0.26",
    "tqdm>=4.66,<5",
    "matplotlib>=3.8,<4",
    "nvidia-ml-py>=12,<14",
    "wandb>=0.18,<1",
]
HARNESS = "lm-eval>=0.4.13,<0.5"  # 300 MB with scipy, pandas, scikit-learn and datasets; no torch
CURATE = ["datatrove>=0.10,<0.11", "trafilatura>=2,<3", "lxml>=5,<7", "lxml_html_clean>=0.4,<1", "pypdfium2>=5,<6", "warcio>=1.7,<2", "charset-normalizer>=3.3,<4",
          "kiwipiepy>=0.20,<0.25", "scikit-learn>=1.4,<2"]
COLLECT = ["fastapi>=0.115,<1", "uvicorn>=0.30,<1", "httpx>=0.27,<1"]
EXTRAS = {
    "curate": CURATE,  # prepare with curate=... (docs/curate.md): pipelines, pages, PDF, crawls, encodings
    "eval": [HARNESS],  # evaluate evaluate.harness=[...] (docs/evaluate.md)
    "collect": COLLECT,  # collect serve (the page), collect augment by an endpoint (docs/collect.md)
    "cuda": ["transformer-engine[pytorch]>=2.5,<3", "flash-attn>=2.7,<3", "triton>=3.4,<4"],  # compiled against the local CUDA
    "dev": ["triton==3.7.1; platform_system == 'Linux'", "pytest>=8,<10", "pytest-timeout>=2.3,<3", "pytest-xdist>=3.7,<4", "ruff>=0.8,<1", "transformers>=4.55,<6",
            "safetensors>=0.4,<1", "wheel<1", "setuptools>=77,<100", HARNESS, *CURATE, *COLLECT,
            "accelerate>=1,<2", "peft>=0.13,<1"],  # what is compared with: the harness's own backend (which asks for accelerate), PEFT
}

setup(
    name="megatron-ext",
    version="0.1.0",
    description="A training runtime for large language models on megatron-core: one config and one code path from a laptop to a cluster",
    python_requires=">=3.11,<3.14",
    # conf/ lies at the top of a checkout and inside the package of a wheel; config/overrides.py looks in both places.
    packages=[*find_packages(include=["kernels", "kernels.*", "megatron_ext", "megatron_ext.*", "rlhf", "rlhf.*"]), "megatron_ext.conf"],
    package_dir={"megatron_ext.conf": "conf"},
    package_data={"megatron_ext.conf": ["*.yaml", "*/*.yaml"], "megatron_ext.submit": ["body.sh", "array.sh"], "megatron_ext.contact": ["hook.sh"],
                  "megatron_ext.plan": ["calibration.json"], "megatron_ext.curate.quality": ["lists/*.yaml"],
                  "megatron_ext.curate.taxonomy": ["seed/*.yaml"],
                  "rlhf.collect": ["page.html"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-ext = megatron_ext.cli.main:main"]},
)
