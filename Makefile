# Everything runs in .venv, which is made on first use and again when what it depends on changes.
#   make demo | test | test-oldest | lint | build | bench | gpu | clean
#   make gpu SMOKE=1                      the GPU suite with tiny models, on the CPU
#   make PYTHON=python3.12 ...            another interpreter (3.10 or newer)
#   make TORCH_INDEX=https://download.pytorch.org/whl/cpu ...
#                                         PyTorch's CPU builds, without several GB of CUDA packages

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
OUT ?= demo-out
BENCH_OUT ?= bench-out
WORKERS ?= 2
PYTEST_ARGS ?=
BENCH_ARGS ?=
SMOKE ?=
GPU_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip install --constraint constraints.txt \
  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# Oldest diffusers that is supported, beside the newest one of the environment.
OLDEST_DIFFUSERS := 0.40.0
OLDEST := $(VENV)/diffusers-$(OLDEST_DIFFUSERS)
OLDEST_TESTS := tests/test_compile.py tests/test_compile_loop.py tests/test_compile_callbacks.py \
  tests/test_compile_runs.py tests/test_guider.py tests/test_guider_pipelines.py \
  tests/test_guider_swap.py tests/test_composition.py tests/test_composition_lora.py \
  tests/test_composition_caches.py tests/test_adapters.py tests/test_compile_graphs_zoo.py \
  tests/test_zoo_compile.py

.PHONY: venv demo test test-oldest lint build bench gpu clean
.DEFAULT_GOAL := venv

venv: $(STAMP)

# torch first: the C++ of the package is built against its headers.
$(STAMP): pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard csrc/*.*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "error: $(PYTHON) is older than 3.10; set PYTHON=python3.x" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
	  || { echo "error: $(PYTHON) lacks venv (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --editable ".[test,metrics]"
	@touch $@

# Threads that sleep while they wait: spinning ones lose many times over to any other busy program.
demo: $(STAMP)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/thg-engine demo --out $(OUT)

# One thread per worker: the tests are many small tensors, where threads cost more than they give,
# and two workers with all cores each fight over them.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(PYTEST_ARGS)

# The adapters against the oldest supported diffusers, which imports httpx unasked.
test-oldest: $(STAMP)
	test -d $(OLDEST)/diffusers-$(OLDEST_DIFFUSERS).dist-info || { $(BIN)/python -m pip install --target $(OLDEST) httpx \
	  && $(BIN)/python -m pip install --no-deps --target $(OLDEST) diffusers==$(OLDEST_DIFFUSERS); }
	PYTHONPATH=$(OLDEST) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup \
	  -m "not slow" -k "not two_prompts and not several_results and not another_resolution" \
	  $(OLDEST_TESTS) $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# setuptools reuses build/ and would pack files that have left the tree: it is removed first.
build: $(STAMP)
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist
	@rm -rf build

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks/bench_plan.py --benchmark-only
	$(BIN)/python benchmarks/bench_step_update.py --json $(BENCH_OUT)/step_update.json \
	  --markdown $(BENCH_OUT)/step_update.md $(BENCH_ARGS)

# Resumable: a part that is stored is skipped; GPU_ARGS=--again runs all anew. One thread as for
# test; on a GPU the host only launches.
gpu: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/gpu_suite.py $(if $(SMOKE),--smoke) $(GPU_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info $(OUT) $(BENCH_OUT) .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
