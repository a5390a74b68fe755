# make run    the main job on the embedded data: corpus, tokenizer, pretraining over two ranks, evaluation, completions, report.md
# make test   everything proven: all tests here, and parity and checkpoints on Python 3.12 with the newest megatron-core
# Both make .venv first where it is missing or out of date. PYTHON=/path/to/python picks the interpreter.
SHELL := bash
.DEFAULT_GOAL := help
PY := .venv/bin/python
ARGS ?=
export PYTHON

.PHONY: help setup run test test-fast test-312 campaign bench wheelhouse lint clean

help:
	@grep -E '^# make|^## ' Makefile | sed 's/^#* //'

## make setup      .venv alone
setup:
	@.ci/environment .venv

run: setup
	@$(PY) -m megatron_ext run $(ARGS)

test: setup
	@.ci/test

## make test-fast  the tests of this Python, without the second leg, stopping at the first failure
test-fast: setup
	@$(PY) -m pytest tests -x -q $(ARGS)

## make test-312   the second leg alone (.ci/second_leg -m "not campaign": every test, on Python 3.12 and the newest megatron-core)
test-312:
	@.ci/second_leg

## make bench      every kernel's benchmark and the collectives, into benchmarks/results/ (ARGS=--quick for a look)
bench: setup
	@$(PY) benchmarks/run_all.py $(ARGS)

## make campaign   what takes longer than a test run should: docs/parity.md, resume.md, faults.md, curation of ../shared/data and of a million documents, the full grids of the kernels, families over four ranks, RLHF in more layouts; docs/learning.md where outputs/run is there
campaign: setup
	@status=0; for each in parity kills curate curate_real; do $(PY) benchmarks/campaign_$$each.py || status=1; done; \
	$(PY) benchmarks/fault_campaign.py || status=1; \
	if [ -d outputs/run/ppo ]; then $(PY) benchmarks/campaign_learn.py outputs/run || status=1; fi; \
	KERNEL_GRID=full OMP_NUM_THREADS=1 $(PY) -m pytest -q tests/test_*norm.py tests/test_*glu.py tests/test_bias_gelu.py tests/test_rope.py \
	    tests/test_gae.py tests/test_fp8.py tests/test_attention.py tests/test_adamw_triton.py tests/test_wgrad_accumulate.py \
	    tests/test_linear_cross_entropy*.py tests/test_context_parallel.py -m "campaign or not campaign" || status=1; \
	OMP_NUM_THREADS=1 $(PY) -m pytest -q tests/test_families.py tests/test_rlhf_layouts.py -m campaign || status=1; exit $$status

## make wheelhouse everything that the project needs as wheels, for machines without a network (DEVICE=cpu, EXTRAS=cuda,dev; slurm/wheelhouse says more)
wheelhouse:
	@slurm/wheelhouse $(ARGS)

## make lint       ruff
lint: setup
	@$(PY) -m ruff check --line-length 140 --extend-ignore SIM905 .

## make clean      environments, caches and builds; runs under outputs/ stay
clean:
	rm -rf .venv .venv-312 build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
