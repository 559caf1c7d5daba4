# make demo and make test are all a newcomer needs; each sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
MADE := $(VENV)/.made-by-make
JOBS ?= 2

.PHONY: setup demo test test-long coverage lint parity bench structure faults package-test versions clean
.DEFAULT_GOAL := setup

setup: $(READY)

# An environment that make did not make is left as it is. In its own, torch and torchvision, which nnU-Net's dependencies
# bring, come as a pair (constraints.txt). Where the package index has only a CPU torch and a CUDA torchvision, that
# torchvision does not load and breaks whoever tries to import it: make takes away what it installed; nothing needs it.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or newer is needed; say which with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@! test -e $(VENV) || test -e $(MADE) -o -e $(READY) || \
	    { echo "$(VENV) was not made by make and is left as it is; name a folder that is free:" \
	           "make VENV=.venv-make $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $(MADE)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(PY) -c 'import torchvision' 2>/dev/null || \
	    { echo "torchvision does not load with this torch: removed, it is not needed"; \
	      $(PY) -m pip uninstall --quiet --yes torchvision; }
	@touch $(READY)

demo: $(READY)  ## the whole job on an embedded example
	$(PY) -m connectomics.cli demo --output demo_output

# Whole files go to the workers, the slow ones first (tests/conftest.py). Compiled files are kept even where the
# environment says otherwise: the tests start many processes, and each would compile the package again.
PYTEST := PYTHONDONTWRITEBYTECODE= $(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: $(READY)  ## the test suite
	rm -f .make-test-seconds
	start=$$(date +%s); \
	    $(PYTEST) -m "not long" && \
	    echo $$(($$(date +%s) - start)) > .make-test-seconds

test-long: $(READY)  ## every combination, long storms
	$(PYTEST) -m long

# Measuring slows a test down by a fifth to two thirds. These are the tests that run in the measured process; those
# that kill what they start add next to nothing.
MEASURED := tests/unit tests/contract tests/property tests/golden $(addprefix tests/parity/test_,from_nnunet.py \
    from_nnunet_nifti.py verify.py cascade.py planes.py) $(addprefix tests/fault/test_,bad_models.py bad_volumes.py bad_archives.py \
    bad_copies.py bad_configuration.py verify_run.py failing_blocks.py)

coverage: $(READY)  ## line coverage of at least 95 % by the tests that run in one process
	rm -f .coverage .coverage.*
	$(PYTEST) -m "not long" --cov --cov-report= $(MEASURED)
	$(PY) -m coverage report --skip-covered --fail-under=95

faults: $(READY)  ## seeded faults, each of which the short tests must find
	$(PY) scripts/seed_faults.py --jobs $(JOBS)

lint: $(READY)  ## the gates that read the code
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports
	$(PY) scripts/write_config_pages.py --check
	$(PY) scripts/write_format_matrix.py --check

parity: $(READY)  ## print the table of docs/fidelity.md
	$(PY) benchmarks/parity.py

bench: $(READY)  ## the network loop against nnUNetPredictor
	$(PY) benchmarks/vs_nnunet.py

package-test: $(READY)  ## wheel and sdist: build, install in a clean environment, run the demo
	$(PY) scripts/check_package.py

versions: $(READY)  ## the lowest and newest nnunetv2 and torch, each in an environment of its own
	$(PY) scripts/check_versions.py

structure: $(READY)  ## rooms, sizes and names, before and now
	$(PY) scripts/structure.py

clean:
	@! test -e $(MADE) -o -e $(READY) || rm -rf $(VENV)
	rm -rf demo_output .coverage* .make-test-seconds .pytest_cache .mypy_cache .ruff_cache .hypothesis
