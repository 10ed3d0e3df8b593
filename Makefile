# Two commands for a newcomer: `make demo` and `make test`. `make check` is what CI runs first.
# PIP_ARGS is passed to pip (an index of CPU builds of torch, say).

VENV    := .venv
PYTHON  := $(VENV)/bin/python
WEIGHTS := .cache/weights
TORCH   := torch==2.13.0
# Compiles the GPU kernels without a GPU; the library runs and passes its tests without it.
TRITON  := triton==3.6.0

# Python keeps what it compiled, whatever the caller's environment says: tests start hundreds of
# interpreters. Of the 15000 files that pip would compile, a quarter is ever imported.
export PYTHONDONTWRITEBYTECODE :=
PIP := $(PYTHON) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)

# The library's dependencies and what tests need, nothing optional.
BARE    := .cache/venv-bare

# vLLM's CPU build and its requirements: several GB, kept apart and cached.
VLLM    := .cache/venv-vllm

# llm-compressor and ModelOpt, which need an older transformers: 2 GB, kept apart and cached.
PEERS   := .cache/venv-peers

.DEFAULT_GOAL := help
.PHONY: help install weights demo test test-kernels test-bare test-vllm test-sglang test-peers test-triton-versions check docs format clean

help:
	@echo "make demo    install into $(VENV), fetch SmolLM2-135M, quantize, plan, verify, generate"
	@echo "make test    all CPU tests; of the Triton kernels in the interpreter, one test of each family"
	@echo "make check   format, lint, types, layers"
	@echo "make test-kernels  Triton kernels in the interpreter, all of it, bit for bit (minutes)"
	@echo "make test-bare     all CPU tests without Triton and without any extra (own environment)"
	@echo "make test-vllm     vLLM's own server on this machine's CPU, with and without blockscale (minutes)"
	@echo "make test-sglang   the plugin against SGLang's own sources, no GPU needed"
	@echo "make test-peers    llm-compressor and ModelOpt read our files, and we theirs (minutes)"
	@echo "make test-triton-versions  the Gluon kernels compile under Triton 3.7, 3.8 and 3.9 (half an hour)"
	@echo "make docs    the documentation site, into .cache/site (own environment, a minute)"
	@echo "make format  rewrite files in the project's format"

install: $(VENV)/.installed

# torch first and pinned: asked for without a version, pip would take a CUDA build of several GB.
$(VENV)/.installed: pyproject.toml
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PIP) --no-compile $(TORCH)
	$(PIP) --no-compile --editable '.[dev]'
	$(PIP) --no-compile $(TRITON) \
	  || echo "no $(TRITON) for this machine: tests of the GPU kernels will be skipped"
	touch $@

weights: install
	$(PYTHON) tools/real_weights.py --cache $(WEIGHTS)

demo: weights
	$(PYTHON) tools/demo.py --weights $(WEIGHTS)

# Each core starts with its share, file after file; who is done first takes from another's end.
# "logical": of two hyperthreads "auto" would count one. Passive: threads of two torches that wait
# do not turn in circles on the cores that the other needs. A test that hangs fails, by its name.
test: weights
	OMP_WAIT_POLICY=passive $(PYTHON) -m pytest -n logical --dist worksteal --timeout 300

# The Triton kernels' arithmetic on the CPU, bit for bit, and tests/gpu on a pretend GPU: minutes, so
# not part of `make test`.
test-kernels: install
	TRITON_INTERPRET=1 $(PYTHON) -m pytest tests/kernels_triton -k interpreted
	TRITON_INTERPRET=1 $(PYTHON) -m pytest tests/pretended
	$(PYTHON) -m pytest -m machine tests/kernels_cuda

# As a user has it who asked for no extra: what needs one is skipped and says which.
test-bare:
	test -x $(BARE)/bin/python || python3 -m venv $(BARE)
	$(BARE)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) $(TORCH)
	$(BARE)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --editable '.[test]'
	OMP_WAIT_POLICY=passive $(BARE)/bin/python -m pytest -n logical --dist worksteal --timeout 300

# A real vLLM server, three times: with blockscale, and twice with it uninstalled.
test-vllm: weights
	$(PYTHON) tools/vllm_environment.py $(VLLM)
	$(VLLM)/bin/python -m pytest -m engine -s tests/integrations/test_vllm_engine.py

test-sglang: install
	$(PYTHON) tools/sglang_source.py
	$(PYTHON) -m pytest -m engine tests/integrations/test_sglang_source.py

# Checkpoints of other packages, in their pinned versions; the lighter ones are in `make test`.
test-peers:
	test -x $(PEERS)/bin/python || python3 -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) $(TORCH)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) \
	  --requirement tests/peers/requirements.txt
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	$(PEERS)/bin/python -m pytest -m peers -o filterwarnings= tests/peers

# Own environments that see the main one's packages, but for Triton.
test-triton-versions: install
	set -e; for release in 3.7.1 3.8.0 3.9.0; do \
	  place=.cache/venv-triton-$$(echo $$release | cut -d. -f1-2 | tr -d .); \
	  test -x $$place/bin/python || $(PYTHON) -m venv $$place; \
	  $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	    > $$($$place/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth; \
	  $$place/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps triton==$$release; \
	  PYTHONPATH=src $$place/bin/python -m pytest -o filterwarnings= tests/kernels_gluon/test_paired_build.py \
	    tests/kernels_gluon/test_gluon_build.py -k 'spill or multicast or refuses'; \
	done

check: install
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# mkdocs reads docs/*.md and the docstrings in src; it neither imports nor needs the library.
docs:
	test -x .venv-docs/bin/mkdocs || { python3 -m venv .venv-docs && .venv-docs/bin/python -m pip install \
	  --quiet --disable-pip-version-check $(PIP_ARGS) 'mkdocs-material>=9.5,<10' 'mkdocstrings[python]>=0.27'; }
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
	@echo "read it: python3 -m http.server --bind 127.0.0.1 --directory .cache/site"

format: install
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
