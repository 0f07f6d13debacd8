# `make demo` and `make test` are all a new machine needs: both prepare .venv from the lock file first.
PYTHON ?= python3
VENV := .venv
LOCK := requirements-cpu.lock
BIN := $(VENV)/bin
# Files of tests that import vLLM, which takes each worker five seconds.
NO_VLLM := --ignore-glob='*vllm*.py'
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# Where it is set, each worker compiles all tests again, for ten seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup browser demo test test-fast coverage check lint

setup:
	@PYTHON="$(PYTHON)" VENV="$(VENV)" LOCK="$(LOCK)" sh .ci/setup

browser:
	@sh .ci/browser

# FAMILY=qwen2.5-vl or smolvlm runs it with a teacher and a student of that architecture.
demo: setup
	$(BIN)/python cli.py demo --out demo-run$(FAMILY:%=-%) $(FAMILY:%=--family %)

test: setup browser check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(NO_VLLM) -m "slow and not vllm and not alone" -n 2 --dist loadfile --durations=15
	$(BIN)/python -m pytest -m "vllm or alone" --durations=15

# The tier for the loop of writing code: starts no engine.
test-fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(NO_VLLM) -m "not slow and not vllm" -q -n 2

# The share of lines that the fast tier runs, by file and in all; fails below fail_under of pyproject.toml.
coverage: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(NO_VLLM) -m "not slow and not vllm" -q -n 2 --cov --cov-report=term:skip-covered

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test-fast
