# Every target sets up what it needs: a virtual environment in .venv, made once and again when the pins change.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: test test-long test-slow demo check format bench clean

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,umap]'
	touch $(READY)

# Two at a time, a module's tests one after the other: they share its sessions, clusters and object stores.
test: $(READY)          ## the test suite (minutes)
	$(BIN)/python -m pytest -m "not long and not slow" -n 2 --dist loadscope

test-long: $(READY)     ## tests that take tens of seconds each: clusters, processes that are killed, every model anew
	$(BIN)/python -m pytest -m "long and not slow" -n 2 --dist loadscope

test-slow: $(READY)     ## tests of minutes: kill -9 at random steps, real atlases, large made ones
	$(BIN)/python -m pytest -m slow -n 2 --dist loadscope

demo: $(READY)          ## simulate -> ingest -> train on Ray -> map -> report
	$(BIN)/scarcade demo --out demo --force

check: $(READY)         ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)         ## the numbers of the README (long)
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build dist *.egg-info demo .mypy_cache .ruff_cache .pytest_cache
