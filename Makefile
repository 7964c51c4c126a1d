# megatron-vlm: everything a person runs, from a fresh clone. `make help` lists it.

# The first of these that is Python 3.11 or 3.12; or say which: make PYTHON=/path/to/python3.12 test
SUPPORTED := import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON    ?= $(shell for python in python3 python3.12 python3.11; do \
                 $$python -c '$(SUPPORTED)' >/dev/null 2>&1 && echo $$python && break; done)
VERSION   := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)

# The tests compare with it. Its pins exclude current transformers and numpy: docs/decisions.md, "mosaicml-streaming".
STREAMING := mosaicml-streaming==0.13.0

# Where torch and the rest are already there (a container, a cluster): make PY=python3 gpu-check
PY        ?= .venv/bin/python
INSTALLED := .venv/.installed-$(VERSION)
READY     := $(if $(filter .venv/bin/python,$(PY)),$(INSTALLED))

# One thread per process: the tests start many processes.
TEST_ENV  := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

# Processes that run the tests, each whole files of them: make WORKERS=4 test
WORKERS   ?= 2
SHORT     := -m "not full and not gpu" -n $(WORKERS) --dist loadfile

BENCHMARKS := train_step packing loader
# In this order; each runs also if one before it has failed.
GPU_BENCHMARKS := attention loss_head real_size memory_ladder feeding real_run fp8_losses
# The size of OLMo-1B.
GPU_SERVING := --bf16 --hidden-size 2048 --num-layers 16 --vocab-size 50304

.DEFAULT_GOAL := help
.PHONY: help .venv demo test test-full coverage lint docs gpu-check bench clean

help:  ## this list
	@grep -hE '^[a-z.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | awk -F '\t' '{printf "  make %-11s %s\n", $$1, $$2}'

.venv: $(INSTALLED)  ## the virtual environment everything below runs in

$(INSTALLED): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c '$(SUPPORTED)' 2>/dev/null || { \
	    echo "make: Python 3.11 or 3.12 with the venv module is needed, found: $(or $(PYTHON),none). Name one: make PYTHON=/path/to/python3.12"; exit 1; }
	@test -e $@ || rm -rf .venv
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[train,serve,tracking,inference,demo,test,docs]'
	.venv/bin/python -m pip install --disable-pip-version-check --progress-bar off --no-deps $(STREAMING)
	@touch $@

demo: $(READY)  ## easy-VQA: data, three training stages, export, answers to the test questions; into runs/demo
	$(PY) examples/instellavl/demo/run.py $(DEMO)

lint: $(READY)  ## style, types, which package may import which, and the words of tools/words.toml
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(PY) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()' --no-logo
	$(PY) tools/check_words.py

test: lint  ## style, types, and all tests that take seconds
	$(TEST_ENV) $(PY) -m pytest -q $(SHORT)

# Not a part of `test`: measuring took 45 to 65 % more processor time.
coverage: $(READY)  ## the tests of `make test`, and which lines they do not run; ranks in processes of their own not counted
	$(TEST_ENV) $(PY) -m pytest -q $(SHORT) --cov --cov-report=term:skip-covered

test-full: lint  ## the same and the tests that take minutes
	$(TEST_ENV) $(PY) -m pytest -q -m "not gpu" --timeout 1800

docs: $(READY)  ## the documentation site, into site/; every link is checked
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

gpu-check: $(READY)  ## on a machine with a GPU: the tests that need one, then attention, the step, its loader, the real command and generation
	@$(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { \
	    echo "make gpu-check: torch finds no GPU here. Nothing was checked."; exit 1; }
	@failed=; \
	$(PY) -m pytest -q -m gpu tests/gpu || failed="tests"; \
	for benchmark in $(GPU_BENCHMARKS); do \
	    $(PY) -W ignore -m benchmarks.$$benchmark || failed="$$failed $$benchmark"; \
	done; \
	$(PY) -W ignore -m benchmarks.serving $(GPU_SERVING) || failed="$$failed serving"; \
	test -z "$$failed" || { echo "make gpu-check: failed: $$failed"; exit 1; }

bench: $(READY)  ## the benchmarks; tables here, JSON in benchmarks/results
	for benchmark in $(BENCHMARKS); do $(PY) -W ignore -m benchmarks.$$benchmark || exit 1; done

clean:  ## remove what make made, runs/ included
	rm -rf .venv runs build dist site .coverage *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
