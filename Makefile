# make demo   fine-tune the shipped checkpoint and prove the result     make test   the test suite
# make bench  every figure of the CPU, into bench/results/             make lint   ruff, mypy, clang-format
# make test-gpu-code   the GPU sources on a machine without a GPU: compiled for every chip, run under an emulator
# Each makes .venv, installs the pinned requirements and builds the extension first, unless that is done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := CMakeLists.txt pyproject.toml $(shell find cpp cuda hip -type f)
CXX_FILES := $(shell find cpp cuda hip tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.hip' -o -name '*.cuh')

.PHONY: build demo test test-gpu-code test-full bench lint format clean
build: $(VENV)/.built

$(VENV)/.requirements: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.built: $(VENV)/.requirements $(NATIVE)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --no-build-isolation --no-deps --editable .
	touch $@

demo: build
	$(BIN)/usaf-ext demo

test: build
	$(BIN)/python -m pytest -m "not gpu_code"

test-gpu-code: build
	$(BIN)/python -m pytest -m gpu_code

# Everything, with the slow cases that `make test` leaves out.
test-full: build
	$(BIN)/python -m pytest --run-slow

# On an idle machine. A peer that cannot be installed is left out.
bench: build
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps experts4bit-qlora==0.58.1
	$(BIN)/python -m pytest bench --benchmark-enable --benchmark-only --report cpu

lint: build
	$(BIN)/ruff check python tests bench cpp/cmake
	$(BIN)/ruff format --check python tests bench cpp/cmake
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: build
	$(BIN)/ruff check --fix python tests bench cpp/cmake
	$(BIN)/ruff format python tests bench cpp/cmake
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) build
