# `make demo` and `make test` are enough on a fresh machine; each makes the environment it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find python/sglang -name '*.py') python/pyproject.toml

LOCKED := -c python/constraints.txt "./python[dev]"

export HF_HUB_OFFLINE = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test lint dev lock clean

demo: $(VENV)/package
	@$(BIN)/python examples/demo.py

# A diffusion test keeps several processes busy, so these tests have the machine to themselves.
test: lint
	$(BIN)/python -m pytest test/srt --numprocesses 2 --dist loadfile --durations=10
	$(BIN)/python -m pytest test/multimodal_gen --durations=10

lint: $(VENV)/package
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# The package as a user gets it: a wheel. It is installed again when its sources change.
# After `make dev` it stays editable.
$(VENV)/package: $(VENV)/environment $(SOURCES)
	@test -e $(VENV)/editable || $(BIN)/pip install -q --no-deps --force-reinstall ./python
	@touch $@

$(VENV)/environment: python/pyproject.toml python/constraints.txt
	@echo "Installing sglang and what it needs into $(VENV): 11 GB, some minutes the first time."
	@$(PYTHON) -m venv $(VENV)
	@# uv takes a fraction of pip's time; where it cannot be had, pip does as well.
	@$(BIN)/pip install -q -c python/constraints.txt uv && \
		$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python $(LOCKED) || \
		$(BIN)/pip install -q $(LOCKED)
	@rm -f $(VENV)/editable
	@touch $@

# For working on it: an edit shows without reinstalling.
dev: $(VENV)/environment
	$(BIN)/pip install -q --no-deps --force-reinstall -e ./python
	@touch $(VENV)/editable $(VENV)/package

lock: $(VENV)/environment
	$(BIN)/pip freeze --exclude sglang-encoder | grep -v '^#' | sort -f > python/constraints.txt

clean:
	rm -rf $(VENV) build
