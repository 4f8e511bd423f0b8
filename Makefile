# `make demo`, `make test` and `make docs` each create .venv and install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# number of test processes, and threads in each
PROCESSES ?= 2
THREADS ?= 1

.PHONY: install demo test docs browser lint format clean

install: $(VENV)/.installed

# torch comes first and pinned, so that no other package chooses its version. torchvision, which fits no CPU build of
# torch, goes where the library does not see it: only tests/tiny_backbones.py uses it.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(shell grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,docs]'
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/torchvision-for-tests torchvision==0.29.0
	touch $@

demo: install
	$(BIN)/rematch demo

test: install lint browser
	OMP_NUM_THREADS=$(THREADS) TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile

# NO_MKDOCS_2_WARNING silences an advertisement
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# the tests of the search page need Debian's chromium; where it is missing and cannot be installed, they are skipped
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
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache
