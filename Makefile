# `make demo` and `make test` start from nothing but Python 3.11 or later.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache

# Python 3.12 or later, for the GPU kernels' tests; empty where there is none.
NEWER ?= $(shell for p in python3.14 python3.13 python3.12 python3 $(wildcard $(HOME)/.pyenv/versions/*/bin/python); do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && { echo $$p; break; }; done)

.PHONY: demo test test-kernels lint bench bench-quick bench-gpu report clean

demo: $(VENV)/.installed
	$(BIN)/jaxedit demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto

# `make test` runs these too, but in Python 3.11 the simulated GPU is not there. They need nothing but jax.
test-kernels:
ifeq ($(NEWER),)
	@echo "no Python 3.12 or later: the kernels' tests on a simulated GPU are left out"
else
	@test -x $(VENV)-kernels/bin/python || $(NEWER) -m venv $(VENV)-kernels
	$(VENV)-kernels/bin/python -m pip install --quiet --disable-pip-version-check jax pytest hypothesis
	PYTHONPATH=kernels $(VENV)-kernels/bin/python -m pytest tests/kernels -o faulthandler_timeout=300
endif

lint: $(VENV)/.installed-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright --pythonpath $(BIN)/python

# REQUESTS=counterfact.json measures on your own edits; QUICK=1 (or bench-quick) shows in minutes that all of it works.
REQUESTS ?= jaxedit/data/packaged/demo.jsonl
BENCH = $(BIN)/python benchmarks/run_all.py --requests $(REQUESTS) $(if $(QUICK),--quick)

bench: $(VENV)/.installed-bench
	$(BENCH)

bench-quick:
	$(MAKE) bench QUICK=1

# One GPU, random weights of Llama-3-8B's shape, less than ten minutes once everything is installed.
bench-gpu: $(VENV)/.installed-bench-gpu
	$(BENCH) --gpu

report: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/report.py

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "jaxedit needs Python 3.11 or later; set PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@ $(VENV)/.installed

# Without a GPU PyTorch's CPU wheel is enough, and gigabytes smaller.
$(VENV)/.installed-bench: $(VENV)/.created pyproject.toml
	$(BIN)/python -c 'import torch' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet torch --index-url https://download.pytorch.org/whl/cpu || \
		$(BIN)/python -m pip install --quiet torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-bench-gpu: $(VENV)/.created pyproject.toml
	$(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)' 2>/dev/null || \
		$(BIN)/python -m pip uninstall --quiet --yes torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench,cuda]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) $(VENV)-kernels .jax_cache .pytest_cache .ruff_cache build dist
