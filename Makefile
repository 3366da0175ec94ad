# `make demo` and `make test` do all of their own set-up: a virtual environment in .venv with the versions of
# requirements/constraints.txt. The set-up runs again only when pyproject.toml or the constraints change.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# test processes; each uses one thread and about 1 GB
PYTEST_WORKERS ?= 2
# Each process takes neighbouring tests, so most fixtures of a file are made once. One that is done takes from the others.
XDIST_ORDER := --dist worksteal
# of `make test-gpu`: the files that have tests for a GPU, and how many of the slowest tests it lists
GPU_TESTS ?= $(wildcard tests/*/test_cuda_*.py) $(wildcard tests/*/test_*_gpu.py) $(wildcard tests/test_*_gpu.py) $(wildcard tests/processing/test_*_processing.py)
DURATIONS ?= 40
# of `make sanitize-kernels`
SANITIZERS ?= memcheck racecheck
COMPUTE_SANITIZER ?= compute-sanitizer
KERNEL ?=
BIN := $(VENV)/bin
CONSTRAINTS := requirements/constraints.txt
PIP_INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS)
INSTALLED := $(VENV)/.installed
WITH_TORCH := $(VENV)/.torch
# of `make test-compatibility`: the environments with the oldest and the newest versions, and which tests run
OLDEST := .venv-oldest
NEWEST := .venv-newest
CHOSEN ?= -m compatibility
CXX_SOURCES = $(shell find modeling_minimax_m3 -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h')

# nothing here reads from a model hub
export HF_HUB_OFFLINE := 1

.PHONY: help setup setup-torch demo finetune-demo test test-install test-compatibility test-oldest test-newest test-versions check-upstream test-gpu \
	lint lint-python lint-types lint-cxx lint-text lint-spelling format benchmark small-model kernels check-kernels sanitize-kernels clean

help:
	@echo "make demo       ask a small MiniMax-M3 about a picture, a video and a fact in a long text"
	@echo "make finetune-demo"
	@echo "                teach a tiny MiniMax-M3 a sentence with LoRA, and ask for it"
	@echo "make test       run the tests (PYTEST_ARGS='-k name' to choose)"
	@echo "make test-versions"
	@echo "                run the tests on the oldest and on the newest versions of the dependencies"
	@echo "make check-upstream"
	@echo "                say whether a newer Transformers is out, and which tests fail on it"
	@echo "make test-gpu   run the tests that need a GPU, on the newest and on the portable kernels"
	@echo "make lint       check style, types and spelling"
	@echo "make format     apply style"
	@echo "make kernels    compile the CUDA kernels into the package (needs nvcc, but no GPU)"
	@echo "make benchmark  time and measure ours beside stock Transformers"
	@echo "make small-model"
	@echo "                write what follows from examples/minimax-m3-small: model card, tables, plots, gallery"
	@echo "make clean      remove the environment and what was built"

setup: $(INSTALLED)

# the larger part of it, which does not build the package
setup-torch: $(WITH_TORCH)

# torch goes first and by itself, so that nothing else decides which build of it is taken
$(WITH_TORCH): $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another with PYTHON=...")'
	@echo "Setting up $(VENV): a few minutes the first time, most of them for torch"
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch torchvision
	@touch $@

$(INSTALLED): pyproject.toml $(CONSTRAINTS) $(WITH_TORCH)
	$(PIP_INSTALL) -e ".[dev]"
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python scripts/demo.py

finetune-demo: $(INSTALLED)
	$(BIN)/python examples/lora/walkthrough.py

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) $(XDIST_ORDER) $(PYTEST_ARGS)

# The README's Install, Load and Chat in an empty environment, which is made anew each time.
test-install:
	$(PYTHON) scripts/check_install.py $(NEWEST) --keep_wheel build/newest

# Tests on the oldest versions that pyproject.toml allows, and on the newest, which `pip install` takes today.
test-compatibility: test-oldest test-install
	$(MAKE) test-newest

test-oldest:
	$(MAKE) test VENV=$(OLDEST) CONSTRAINTS=requirements/oldest.txt PYTEST_ARGS="$(CHOSEN)"

# After test-install. Where the newest versions are the pinned ones, `make test` is their test.
test-newest: $(INSTALLED)
	$(NEWEST)/bin/python -m pip install -qq "$$(ls build/newest/*.whl)[dev]"
	@differing="$$($(BIN)/python scripts/differing_versions.py $(NEWEST)/bin/python)"; \
	if [ -n "$$differing" ]; then \
		echo "Not the pinned versions, so the tests run on the newest:"; echo "$$differing"; \
		$(NEWEST)/bin/python -m pytest -n $(PYTEST_WORKERS) $(XDIST_ORDER) $(CHOSEN); \
	else \
		echo "The newest versions are the pinned ones: make test covers them"; \
	fi

test-versions:
	$(MAKE) test-compatibility CHOSEN=

check-upstream: $(INSTALLED)
	$(BIN)/python scripts/check_upstream.py

# The hooks of .pre-commit-config.yaml are these parts.
lint: lint-python lint-types lint-cxx lint-text lint-spelling

lint-python: $(INSTALLED)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

lint-types: $(INSTALLED)
	$(BIN)/python scripts/check_types.py

lint-cxx: $(INSTALLED)
	$(if $(CXX_SOURCES),$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES))

lint-text: $(INSTALLED)
	$(BIN)/python scripts/check_text.py

lint-spelling: $(INSTALLED)
	$(BIN)/python -m codespell_lib

format: $(INSTALLED)
	$(BIN)/python scripts/check_text.py --fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CXX_SOURCES),$(BIN)/clang-format -i $(CXX_SOURCES))

benchmark: $(INSTALLED)
	$(BIN)/python -m benchmarks

# Everything that is made from examples/minimax-m3-small and benchmarks/results/pretraining_*; docs/pretraining.md says
# how to replace these. Some minutes.
small-model: $(INSTALLED)
	$(BIN)/python scripts/write_model_card.py examples/minimax-m3-small \
		--evaluation benchmarks/results/pretraining_scores.json benchmarks/results/pretraining_recall_1m.json
	$(BIN)/python scripts/plot_evaluation.py benchmarks/results/pretraining_scores.json docs/images/pretraining_scores.png
	$(BIN)/python scripts/plot_curves.py benchmarks/results/pretraining_curves.jsonl benchmarks/results/pretraining_curves_2.jsonl benchmarks/results/pretraining_curves_3.jsonl docs/images/pretraining_curves.png
	$(BIN)/python scripts/ablation.py plot benchmarks/results/pretraining_ablation.json docs/images/ablation.png
	$(BIN)/python scripts/ablation.py plot benchmarks/results/pretraining_ablation_recall.json docs/images/ablation_recall.png
	$(BIN)/python scripts/make_gallery.py examples/minimax-m3-small docs/gallery.html
	$(BIN)/python scripts/extract_selections.py examples/minimax-m3-small benchmarks/selections.npz
	$(BIN)/python scripts/small_model_tables.py --write

kernels: $(INSTALLED)
	$(BIN)/python scripts/build_kernels.py

check-kernels: $(INSTALLED)
	$(BIN)/python scripts/build_kernels.py --check

# All tests that need a GPU, in one process: on the newest kernels that it runs and on the portable ones, each test on
# both in turn. MINIMAX_M3_MSA_CUDA=portable (or =auto) takes only one of them. The kernels are built before, if they are
# not there.
test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu --durations=$(DURATIONS) $(PYTEST_ARGS) $(GPU_TESTS)

# The smallest cases of every kernel, one log per tool. KERNEL=backward takes the tests whose names have the word (an
# expression of pytest's -k). Every tensor has an allocation of its own, so that an access past one is seen; kernels of
# torch are not looked at, because that takes most of the time.
sanitize-kernels: $(INSTALLED)
	mkdir -p build
	failed=0; for tool in $(SANITIZERS); do \
		echo "$$tool: build/sanitizer-$$tool.log"; \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(COMPUTE_SANITIZER) --tool $$tool --kernel-name kns=msa --error-exitcode 1 \
			--log-file build/sanitizer-$$tool.log \
			$(BIN)/python -m pytest tests/msa/test_cuda_each_kernel.py -k "$(KERNEL)" --durations=0 || failed=1; \
		tail -n 1 build/sanitizer-$$tool.log; \
	done; exit $$failed

clean:
	rm -rf modeling_minimax_m3/msa/kernels-*.so
	rm -rf $(VENV) $(NEWEST) $(OLDEST) .venv-upstream build dist demo_output finetune_demo .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
