# Two commands: `make demo` and `make test`. Each makes .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# tests run in so many processes, each with so many threads
PROCESSES ?= 2
THREADS ?= 1

.PHONY: install demo test browser lint format clean

install: $(VENV)/.installed

# torch first and pinned, so that no other package chooses its version; torchvision, which fits no CPU build of it, out of
# the library's sight: only tests/tiny_backbones.py uses it
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(shell grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/torchvision-for-tests torchvision==0.29.0
	touch $@

demo: install
	$(BIN)/rematch demo

test: install lint browser
	OMP_NUM_THREADS=$(THREADS) TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile

# the tests of the search page want Debian's chromium; without it, and without the right to install it, they are skipped
browser:
	@command -v chromium >/dev/null || (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium) \
		>/dev/null 2>&1 || echo "no chromium here: the tests of the search page are skipped"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
