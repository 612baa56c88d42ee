# `make demo` and `make test` do all the set-up themselves, in a virtual environment of the project's own.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
JOBS ?= 2
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc cmake -type f)

.PHONY: demo demo-seq2seq test lint soak bench check-gpu clean

demo: $(VENV)/.installed
	$(BIN)/elang demo

demo-seq2seq: $(VENV)/.installed
	$(BIN)/elang demo seq2seq

# A file's tests stay together: they share what they have made.
test: lint
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A million rows through the batcher, a hundred thousand through HTTP: nothing lost, doubled or swapped, memory flat.
soak: $(VENV)/.installed
	$(BIN)/python benches/soak.py

bench: $(VENV)/.installed
	$(BIN)/python -m pytest benches -s

# On a machine with a GPU, with that machine's own Python and torch.
check-gpu:
	$(PYTHON) benches/check_gpu.py $(STAGES)

# torch first and on its own: a range asked for later is then satisfied by the build that is there.
$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet "setuptools>=77" cmake ninja "pybind11>=2.13"
	CMAKE_ARGS=-DELANG_WERROR=ON PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[test]"
	touch $@

clean:
	rm -rf build dist *.egg-info elang/*.so $(VENV)
