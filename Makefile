# Needs Python 3.10 or newer, nothing else. README.md has the same commands for those without make.
PYTHON ?= python3
VENV ?= .venv

# Without an NVIDIA driver the version that has been tested on the CPU is enough. PyPI's wheels for Linux bring CUDA
# along; if PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS names a place with PyTorch's CPU builds, pip takes the smaller
# 2.13.0+cpu from there, because a local version counts as newer. With a driver, pip may choose freely.
TORCH ?= $(if $(shell command -v nvidia-smi),torch,torch==2.13.0)

# Ranks on the CPU: one thread each, and freed memory is kept, since giving it back costs more than the arithmetic.
CPU_RANKS = OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 \
	MALLOC_TOP_PAD_=268435456

.PHONY: demo test test-slow lint install clean

demo: install
	$(CPU_RANKS) $(VENV)/bin/python examples/demo.py

# Most of it is one process's work, which leaves a core of two idle: JOBS files at a time.
JOBS ?= 2
test: install
	$(CPU_RANKS) $(VENV)/bin/python -m pytest --numprocesses $(JOBS) --dist loadfile

# The slow set in parts: PART is a folder or a file under tests/.
test-slow: install
	$(CPU_RANKS) $(VENV)/bin/python -m pytest -m slow $(addprefix tests/,$(PART))

lint: install
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m mypy

install: $(VENV)/installed

# Torch first: it decides which of its builds everything else is installed against.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --upgrade "pip>=23"
	$(VENV)/bin/python -m pip install "$(TORCH)"
	$(VENV)/bin/python -m pip install --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
