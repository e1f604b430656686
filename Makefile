# Everything a user or a developer needs, each in one word.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test slow check format golden bench gpu clean

demo: $(INSTALLED)  ## three real workloads under a budget, on this machine
	@$(BIN)/python benchmarks/demo.py

test: $(INSTALLED)  ## the default tests
	@$(BIN)/python -m pytest

slow: $(INSTALLED)  ## the long tests
	@$(BIN)/python -m pytest -m slow

check: $(INSTALLED)  ## format, lint, types, layers, the gallery
	$(BIN)/ruff format --check attngen tests benchmarks generated
	$(BIN)/ruff check attngen tests benchmarks generated
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/attngen emit --check generated generated/triton

format: $(INSTALLED)
	$(BIN)/ruff format attngen tests benchmarks
	$(BIN)/ruff check --fix attngen tests benchmarks

golden: $(INSTALLED)  ## emit the gallery anew
	$(BIN)/python tests/gallery.py

bench: $(INSTALLED)  ## the committed benchmark
	$(BIN)/python benchmarks/targets_cpu.py

gpu: $(INSTALLED)  ## all that needs a GPU: validate, tune, benchmark
	@$(BIN)/python -m pytest tests/test_triton.py tests/test_triton_files.py \
		tests/test_triton_random.py tests/test_triton_vjp.py tests/test_triton_decode.py \
		tests/test_triton_storage.py tests/test_triton_dims.py tests/test_gallery_triton.py \
		tests/test_gpu.py
	@$(BIN)/python benchmarks/gpu.py

$(INSTALLED): pyproject.toml
	@echo "setting up $(VENV) (once, about a minute) …"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "attngen needs Python 3.11 or newer: make PYTHON=python3.12 …"; exit 2; }
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
