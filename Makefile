# `make demo` and `make test` need Python >= 3.11 and make; they set up .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench bench-quality clean

demo: $(VENV)/installed
	$(BIN)/sgpt fit --config configs/demo.yaml

# Two processes of one thread each: most tests are loops over small tensors, which a second thread does not help.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Solve time against a plain transcription of the published loop, on the embedded model.
bench: $(VENV)/installed
	$(BIN)/python scripts/benchmark_solver.py

# Perplexity over true bytes, this package and its rivals; MODEL, CALIBRATION, EVALUATION and SEEDS choose what is run.
bench-quality: $(VENV)/installed
	$(BIN)/python scripts/benchmark_quality.py $(if $(MODEL),--model $(MODEL)) \
	  $(if $(CALIBRATION),--calibration $(CALIBRATION)) $(if $(EVALUATION),--evaluation $(EVALUATION)) \
	  $(if $(SEEDS),--seeds $(SEEDS))

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info .mypy_cache .pytest_cache .ruff_cache
