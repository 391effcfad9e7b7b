# Needs Python 3.10 or newer, make and a C compiler. Everything is installed into .venv, nothing elsewhere.
PYTHON ?= python3
PROMPT ?= a red circle on white
TESTS ?= tests
FUZZ_SECONDS ?= 300
VENV := .venv
DEV := docs lint test
LOWEST := .venv-lowest
RUN := $(VENV)/bin/python
# Python compiles what is imported; pip would compile 19,000 files one after the other, for a minute.
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
CPP = $(shell git ls-files --cached --others --exclude-standard '*.c' '*.cpp' '*.cu' '*.h' '*.hpp')

# One thread in each process: on a busy machine the spinning workers of a second one make torch many times slower.
PYTEST := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(RUN) -m pytest
# A process for each core, at most four for the memory they take. The order is tests/conftest.py's.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
PLATFORM := $(shell uname -sm)

.PHONY: help demo demo-engine operators test test-fast test-lowest fuzz lint types format docs bench clean
.NOTPARALLEL:

help:
	@echo "make demo       export the demo model at a fifth of its KV cache and generate PROMPT=\"$(PROMPT)\","
	@echo "                then build a TensorRT-RTX engine (Linux on x86-64, no GPU needed; that alone: make demo-engine)"
	@echo "make operators  build the operators that make steps on a CPU shorter (cmake, a C++ compiler, ONNX Runtime's headers)"
	@echo "make test       run the tests (a part: make test TESTS=tests/cli)"
	@echo "make test-fast  run the tests that take no more than a few seconds each"
	@echo "make test-lowest  the lower bounds of all packages: export, generate, verify (6 GB, minutes)"
	@echo "make fuzz       fuzz every parsed file, FUZZ_SECONDS=$(FUZZ_SECONDS) each (build/fuzz keeps what is found)"
	@echo "make lint       check the format and the rules of Python and C++"
	@echo "make types      check the types of the package"
	@echo "make format     format Python and C++"
	@echo "make docs       build the documentation into build/site"
	@echo "make bench      time the demo model beside transformers and the full cache"
	@echo "make clean      remove .venv, the bundles and the site"
	@echo "PYTHON=...      the Python that makes .venv (now $(PYTHON))"

demo: $(VENV)/installed
	$(RUN) cli.py export --budget 0.2 --force
	$(RUN) cli.py generate "$(PROMPT)" --out out.png
	@$(MAKE) --no-print-directory demo-engine
	@echo "out.png shows \"$(PROMPT)\"; next: $(RUN) cli.py generate \"a blue square on pink\", or docs/tutorial.md"

# The Python runner loads it from there. ONNX Runtime's headers are those of a package, of the folder build/ort
# (engines/scripts/fetch_onnxruntime_headers.sh build/ort), or of the unpacked archive that ONNXRUNTIME_ROOT names.
operators:
	cmake -S engines/operators -B build/operators
	cmake --build build/operators

# After the image, because TensorRT-RTX is 104 MB to download. It builds for GPUs that are not there.
demo-engine: $(VENV)/installed
ifeq ($(PLATFORM),Linux x86_64)
	@if reason=$$($(INSTALL) -e ".[export,ort,rtx]" 2>&1); then \
	    echo "$(RUN) cli.py build-engine"; $(RUN) cli.py build-engine; \
	else echo "no TensorRT-RTX engine: pip cannot install its wheel here ($$(echo "$$reason" | grep -m 1 ERROR))"; fi
else
	@echo "no TensorRT-RTX engine: its wheel is for Linux on x86-64, and this is $(PLATFORM)"
endif

# pytest exits with 5 where it found no test: a part of the tests may have no serial ones.
test: $(VENV)/installed-test
	$(PYTEST) $(PARALLEL) -m "not serial" $(TESTS)
	$(PYTEST) -m serial $(TESTS) || [ $$? = 5 ]

test-fast: $(VENV)/installed-test
	$(PYTEST) $(PARALLEL) -m "not slow and not serial" $(TESTS)

# Every lower bound of pyproject.toml at once, torch included (6 GB): export, generate with both runners, verify.
test-lowest:
	$(PYTHON) -m venv $(LOWEST)
	$(PYTHON) .ci/lowest_versions.py export ort > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c $(LOWEST)/constraints.txt ".[export,ort]"
	cd $(LOWEST) && for options in "" "--dtype fp16 --weights int4" "--weights int8 --kv-dtype int8"; do \
	    bin/ssd-export export --budget 0.2 --out bundle --force $$options && \
	    bin/ssd-export generate "$(PROMPT)" --bundle bundle && \
	    bin/ssd-export generate "$(PROMPT)" --bundle bundle --runner torch && \
	    bin/ssd-export verify --bundle bundle || exit 1; done

# Guided by coverage where atheris has a wheel for this Python; else by mutation alone, and it says so.
fuzz: $(VENV)/installed-test
	@$(INSTALL) atheris || echo "atheris does not install here: inputs are mutated without coverage"
	$(RUN) -m tests.fuzz.run --seconds $(FUZZ_SECONDS)

lint: $(VENV)/installed-lint
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)

types: $(VENV)/installed-test $(VENV)/installed-lint
	$(RUN) -m mypy ssd_export

format: $(VENV)/installed-lint
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .
	$(VENV)/bin/clang-format -i $(CPP)

docs: $(VENV)/installed-docs
	$(RUN) -m sphinx --fail-on-warning --keep-going --quiet -c docs . build/site

bench: $(VENV)/installed-test
	$(RUN) cli.py export --budget 0.2 --force
	$(RUN) cli.py bench --batch 1,8 --threads 1

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e ".[export,ort]"
	@touch $@

# What [dev] brings together need not be installed again one by one.
$(VENV)/installed-%: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e ".[export,ort,$*]"
	@touch $@ $(VENV)/installed $(if $(filter dev,$*),$(DEV:%=$(VENV)/installed-%))

$(VENV)/bin/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed: make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) $(LOWEST) bundles build/site
