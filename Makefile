# kmend. `make demo` shows it at work, `make test` runs every check; both set up what they need.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# The tests of one file stay on one worker, in order: those that share a guest follow each other.
TEST_JOBS ?= $(shell nproc)
CODE := $(wildcard src tests bench packaging)

MAKEFLAGS += --no-print-directory
.PHONY: setup demo test slow lint lab bench sweep deb
.DEFAULT_GOAL := setup

setup: $(READY)

$(READY): pyproject.toml src/kmend/cli/needs.txt scripts/setup
	@PYTHON=$(PYTHON) scripts/setup

demo: $(READY)
	@scripts/demo

lint: $(READY)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder

# What takes minutes each: kills, power cuts, random scenarios, stalls, real-time kernels.
slow: $(READY)
	$(BIN)/pytest -m slow

deb: $(READY)
	@$(BIN)/python packaging/build_deb.py build

lab: $(READY)
	$(BIN)/pytest -m lab

bench: $(READY)
	@for file in bench/bench_*.py; do $(BIN)/python "$$file" || exit 1; done

sweep: $(READY)
	@$(BIN)/python bench/sweep.py
