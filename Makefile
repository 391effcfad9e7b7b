# Needs Python 3.10 or newer, make and a C compiler. Everything is installed into .venv, nothing elsewhere.
PYTHON ?= python3
PROMPT ?= a red circle on white
TESTS ?= tests
VENV := .venv
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt

PLATFORM := $(shell uname -sm)

.PHONY: help demo demo-engine test clean
.NOTPARALLEL:

help:
	@echo "make demo    export the demo model at a fifth of its KV cache and draw: PROMPT=\"$(PROMPT)\","
	@echo "             then build a TensorRT-RTX engine of it (Linux on x86-64, no GPU needed; that alone: make demo-engine)"
	@echo "make test    run the tests (a part: make test TESTS=tests/cli)"
	@echo "make clean   remove .venv and the bundles"
	@echo "PYTHON=...   the Python that makes .venv (now $(PYTHON))"

demo: $(VENV)/installed
	$(RUN) cli.py export --budget 0.2 --force
	$(RUN) cli.py generate "$(PROMPT)" --out out.png
	@$(MAKE) --no-print-directory demo-engine

# After the picture, because TensorRT-RTX is 104 MB to download. It builds for GPUs that are not there.
demo-engine: $(VENV)/installed
ifeq ($(PLATFORM),Linux x86_64)
	@if reason=$$($(INSTALL) -e ".[export,ort,rtx]" 2>&1); then \
	    echo "$(RUN) cli.py build-engine"; $(RUN) cli.py build-engine; \
	else echo "no TensorRT-RTX engine: pip cannot install its wheel here ($$(echo "$$reason" | grep -m 1 ERROR))"; fi
else
	@echo "no TensorRT-RTX engine: its wheel is for Linux on x86-64, and this is $(PLATFORM)"
endif

# A process for each core, at most four for the memory they take. One thread in each: on a busy machine the spinning
# workers of a second one make torch many times slower.
test: $(VENV)/installed-test
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(TESTS)

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e ".[export,ort]"
	@touch $@

$(VENV)/installed-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e ".[test]"
	@touch $@ $(VENV)/installed

$(VENV)/bin/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed: make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) bundles
