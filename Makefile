# Each target sets up what it needs in .venv and does nothing twice.

PYTHON ?= python3
BIN := .venv/bin
NATIVE := $(wildcard native/*.cpp native/*.h)

.PHONY: demo test check bench sanitize docs clean

demo: .venv/.installed
	$(BIN)/tensortier run smollm2 -p "Explain in two sentences why leaves are green." --temperature 0 --max-tokens 120

test: .venv/.installed
	@scripts/browser.sh
	$(BIN)/python -m pytest

check: .venv/.installed
	$(BIN)/ruff check src tests bench scripts
	$(BIN)/ruff format --check src tests bench scripts
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)
	$(BIN)/python scripts/gen_cli_docs.py --check

bench: .venv/.installed
	$(BIN)/python -m bench.decode_speed

# The native tests again, with the plug-in built under the address and undefined-behaviour sanitizers, then
# under the thread sanitizer.
sanitize: .venv/.installed
	$(BIN)/python scripts/sanitize.py

docs: .venv/.installed
	$(BIN)/python scripts/gen_cli_docs.py

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$@ -m pip install --quiet --upgrade pip

# An editable install: Python files are used where they lie, the native plug-in is built anew when it changes.
# The first one compiles llama.cpp, about four minutes on two cores; pip keeps the result in its cache.
.venv/.installed: pyproject.toml CMakeLists.txt $(NATIVE) | .venv/bin/python
	@echo "Installing (the first time compiles llama.cpp: some minutes) ..."
	$(BIN)/python -m pip install --quiet --editable ".[demo,dev]"
	@touch $@

clean:
	rm -rf .venv .cache build
