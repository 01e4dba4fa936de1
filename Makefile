# Everything that people and CI run. A target that needs an environment makes it, once.

PYTHON ?= python3
VENV ?= .venv
CORE_VENV ?= .venv-core
OLDEST_VENV ?= .venv-oldest
GPU_VENV ?= .venv-gpu
# built for one release of CUDA, which the driver must know: here 13, driver 580 or newer
GPU_PACKAGES ?= torch jax[cuda13] cupy-cuda13x[ctk]>=14.1

BIN := $(VENV)/bin
PIP_INSTALL := -m pip install -qq --disable-pip-version-check -c constraints.txt
PYTEST_FLAGS ?= -q -n auto --dist worksteal
REQUIREMENTS := pyproject.toml constraints.txt
# JAX compiles each operation for each shape: quickly is better than well, and its older emitters
# take half the time. Its usual code is what the examples and the documentation run
QUICKLY := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 \
    XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true \
    --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

# a picture is written, never shown
export MPLBACKEND := Agg
# the theme's notice that its successor is in preparation
export NO_MKDOCS_2_WARNING := 1
# an activated environment or a path of the caller's must not leak into ours
unexport PYTHONPATH PYTHONHOME

##@ Use

.PHONY: help
help: ## show this list
	@awk 'BEGIN { FS = ":.*## " } \
	    /^##@/ { printf "\n%s\n", substr($$0, 5) } \
	    /^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: demo
demo: $(VENV)/.ready-demo ## train factorized experts on real images, with NumPy alone
	@$(BIN)/tensormoe demo

##@ Check

# Checks of one process each, which leave other cores idle: beside `unit`, their output comes last.
BESIDE := typecheck test-core docs build-check examples

.PHONY: test
test: lint ## all the checks below
	@log=$$(mktemp); trap 'kill $$! 2> /dev/null || true; rm -f "$$log"' EXIT; status=0; \
	    $(MAKE) --no-print-directory $(BESIDE) > "$$log" 2>&1 & \
	    $(MAKE) --no-print-directory unit || status=1; \
	    wait $$! || status=1; \
	    cat "$$log"; exit $$status
	@echo "== all checks passed"

.PHONY: lint
lint: $(VENV)/.ready-dev ## ruff: rules and format; which package may import which
	@echo "== lint"
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet || { echo "Run: make format"; exit 1; }
	@$(BIN)/lint-imports --no-cache > /dev/null || $(BIN)/lint-imports --no-cache

.PHONY: typecheck
typecheck: $(VENV)/.ready-dev ## mypy --strict
	@echo "== typecheck"
	@$(BIN)/mypy

.PHONY: unit
unit: $(VENV)/.ready-dev ## tests, doctests, and the code in README.md and docs/
	@echo "== unit"
	@# random examples are the same in every run; HYPOTHESIS_PROFILE=dev draws others, and make fuzz
	@# many of them
	@# the blocks of a document build on one another: they stay in one process, beside the others
	@log=$$(mktemp); trap 'kill $$! 2> /dev/null || true; rm -f "$$log"' EXIT; status=0; \
	    $(BIN)/python -m pytest -q README.md docs > "$$log" 2>&1 & \
	    HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-ci} $(QUICKLY) \
	    $(BIN)/python -m pytest $(PYTEST_FLAGS) tests tensormoe backends || status=1; \
	    wait $$! || status=1; \
	    cat "$$log"; exit $$status

.PHONY: test-core
test-core: $(CORE_VENV)/.ready ## the core where no array library is installed
	@echo "== test-core"
	@$(CORE_VENV)/bin/python -c 'import importlib.util as u; import sys; \
	    found = [n for n in ("numpy", "torch", "jax", "cupy") if u.find_spec(n)]; \
	    sys.exit(f"not an environment without array libraries: {found}" if found else 0)'
	@$(CORE_VENV)/bin/python -m pytest -q --confcutdir=tests tests/core

.PHONY: test-oldest
test-oldest: $(OLDEST_VENV)/.ready ## tests on the oldest admitted versions (not part of test)
	@echo "== test-oldest"
	@# the constraints admit one release of PyTorch, which its own tests have run on already
	@$(QUICKLY) \
	    $(OLDEST_VENV)/bin/python -m pytest $(PYTEST_FLAGS) \
	    --confcutdir=tests --ignore=tests/torch --ignore=tests/huggingface tests

.PHONY: test-gpu gpu
test-gpu: gpu $(GPU_VENV)/.ready ## CuPy, PyTorch and JAX on an NVIDIA GPU (not part of test)
	@TENSORMOE_TEST_DEVICE=cuda $(GPU_VENV)/bin/python tests/gpu

.PHONY: gpu-report
gpu-report: gpu $(GPU_VENV)/.ready ## the same and speed, in 8 minutes: out/gpu-report.md (not part of test)
	@$(GPU_VENV)/bin/python benchmarks/gpu_report.py

gpu:
	@echo "== $(firstword $(filter test-gpu gpu-report,$(MAKECMDGOALS)) gpu)"
	@# asked before gigabytes are installed
	@$(PYTHON) tests/gpu/_driver.py

.PHONY: test-distributed
test-distributed: $(VENV)/.ready-dev ## layers cut over 2, 4 and 8 processes (not part of test)
	@echo "== test-distributed"
	@TENSORMOE_TEST_PROCESSES=2,4,8 HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-ci} $(QUICKLY) \
	    $(BIN)/python -m pytest -q tests/torch/test_parallel_*.py
	@for sizes in "1 1" "2 2" "4 2" "8 4"; do set -- $$sizes; \
	    echo "$$1 processes, layers over $$2"; \
	    OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node $$1 examples/gpt_over_devices.py \
	        --tensor $$2 --steps 20 2> /dev/null | grep -E "^(step|saved)" || exit 1; \
	done

.PHONY: fuzz
fuzz: $(VENV)/.ready-dev ## random cases, and junk at every door; resumes (not part of test)
	@echo "== fuzz"
	@$(QUICKLY) \
	    PYTHONPATH=.:backends $(BIN)/python -m tests.fuzz

.PHONY: docs
docs: $(VENV)/.ready-dev ## the documentation, built strictly into site/
	@echo "== docs"
	@# not --quiet: it would keep the warnings from --strict, which counts them
	@# npm puts Python for browsers beside the rank explorer once; where there is none, the build says so
	@$(BIN)/mkdocs build --strict 2>&1 | sed '/^INFO /d'

.PHONY: docs-check
docs-check: $(VENV)/.ready-docs-check ## every page of the documentation in Chromium (not part of test)
	@echo "== docs-check"
	@PYTHONPATH=.:backends $(BIN)/python -m tests.docs

.PHONY: explorer-check
explorer-check: $(VENV)/.ready-docs-check ## the explorer of experts in Chromium (not part of test)
	@echo "== explorer-check"
	@PYTHONPATH=.:backends $(BIN)/python -m tests.explorer

.PHONY: rank-explorer-check
rank-explorer-check: $(VENV)/.ready-docs-check ## the rank explorer in Chromium (not part of test)
	@echo "== rank-explorer-check"
	@PYTHONPATH=.:backends $(BIN)/python -m tests.choosing_page

.PHONY: build-check
build-check: $(VENV)/.ready-dev ## sdist -> wheel -> clean environment -> import every package
	@echo "== build-check"
	@$(BIN)/python .ci/build_check.py

.PHONY: examples
examples: $(VENV)/.ready-dev ## run every example, warnings as errors
	@echo "== examples"
	@for example in examples/[a-z]*.py; do \
	    quick=$$(grep -q -e '--quick' "$$example" && echo --quick || true); \
	    echo "$$example $$quick"; \
	    $(BIN)/python -W error "$$example" $$quick > /dev/null || exit 1; \
	done

.PHONY: bench
bench: $(VENV)/.ready-bench ## speed, as ratios taken in one run (not part of test)
	@for benchmark in benchmarks/bench_*.py; do $(BIN)/python "$$benchmark" || exit 1; done

##@ Work

.PHONY: format
format: $(VENV)/.ready-dev ## rewrite the code in the project's style
	@$(BIN)/ruff check --fix-only --quiet
	@$(BIN)/ruff format --quiet

.PHONY: support
support: $(VENV)/.ready-dev ## write docs/support.md from the tests of what works where
	@$(BIN)/python -m tests.support

.PHONY: docs-serve
docs-serve: $(VENV)/.ready-dev ## the documentation in a browser, rebuilt as you write
	@$(BIN)/mkdocs serve

.PHONY: pre-commit
pre-commit: $(VENV)/.ready-dev ## run the checks of a commit now, and before every commit
	@$(BIN)/pre-commit install
	@$(BIN)/pre-commit run --all-files

.PHONY: clean
clean: ## remove environments and everything built
	@rm -rf $(VENV) $(CORE_VENV) $(OLDEST_VENV) $(GPU_VENV) build dist site out \
	    docs/explorer/node_modules \
	    .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find tensormoe backends tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Environments. A stamp says that an environment holds what the requirements said at that time.

$(VENV)/bin/python:
	@$(call make_venv,$(VENV))

$(VENV)/.ready-demo: $(REQUIREMENTS) | $(VENV)/bin/python
	@echo "== setting up $(VENV): tensormoe with NumPy, the command line and the demo"
	@$(BIN)/python $(PIP_INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.ready-dev: $(REQUIREMENTS) | $(VENV)/bin/python
	@echo "== setting up $(VENV): tensormoe with all that its checks need"
	@$(BIN)/python $(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.ready-demo

$(VENV)/.ready-docs-check: $(REQUIREMENTS) | $(VENV)/bin/python
	@echo "== setting up $(VENV): the documentation, and what drives a browser"
	@$(BIN)/python $(PIP_INSTALL) -e '.[docs-check]'
	@touch $@

$(VENV)/.ready-bench: $(REQUIREMENTS) | $(VENV)/bin/python
	@echo "== setting up $(VENV): what the benchmarks compare with"
	@$(BIN)/python $(PIP_INSTALL) -e '.[bench]'
	@touch $@ $(VENV)/.ready-dev $(VENV)/.ready-demo

$(CORE_VENV)/.ready: $(REQUIREMENTS)
	@echo "== setting up $(CORE_VENV): the core alone"
	@$(call make_venv,$(CORE_VENV))
	@$(CORE_VENV)/bin/python $(PIP_INSTALL) -e . hypothesis pytest
	@touch $@

$(OLDEST_VENV)/.ready: $(REQUIREMENTS)
	@echo "== setting up $(OLDEST_VENV): the oldest versions"
	@$(call make_venv,$(OLDEST_VENV))
	@# by pip, which knows where the PyTorch of the other environments is from
	@$(OLDEST_VENV)/bin/python $(PIP_INSTALL) uv torch
	@$(OLDEST_VENV)/bin/uv pip install --quiet --python $(OLDEST_VENV)/bin/python \
	    --resolution lowest-direct -c constraints.txt -e '.[cluster,cupy,demo,equinox,flax,testing]' \
	    'array-api-compat>=1.11' 'array-api-strict>=2.3' 'dask[array]>=2025.7' \
	    'flatbuffers>=24.3' 'mpmath>=1.3' 'pytest-xdist>=3.6' 'safetensors>=0.8' \
	    'transformers>=5.13'
	@touch $@

# also under make -k, nothing is installed where there is no GPU
$(GPU_VENV)/.ready: $(REQUIREMENTS) | gpu
	@echo "== setting up $(GPU_VENV): $(GPU_PACKAGES)"
	@$(call make_venv,$(GPU_VENV))
	@# without the constraints, which pin a PyTorch without CUDA
	@$(GPU_VENV)/bin/python -m pip install -qq --disable-pip-version-check \
	    -e '.[testing]' 'entmax>=1.3' $(foreach package,$(GPU_PACKAGES),'$(package)')
	@touch $@

define make_venv
command -v $(PYTHON) > /dev/null || { \
    echo "$(PYTHON) was not found. Name a Python >= 3.11: make PYTHON=/path/to/python $(MAKECMDGOALS)"; exit 1; }; \
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
    echo "tensormoe needs Python >= 3.11; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
    "Name another: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }; \
$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
    echo "$(PYTHON) lacks the venv module. Install it (Debian and Ubuntu: apt install python3-venv)."; exit 1; }; \
$(PYTHON) -m venv --clear $(1)
endef
