# Needs Python 3.11 and make; everything else goes into the virtual environment $(VENV).
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH_READY := $(VENV)/.bench-ready
TEST_PROCESSES ?= 3
ROUNDS ?= 3
COUNT ?= 1000000
SECONDS ?= 600
SEED ?= 0
RESULTS := benchmarks/results
CONFORMANCE := ../shared/conformance/run.py

.PHONY: setup demo demo-brokerless test fuzz chaos lint format types audit conformance gpu clean
.PHONY: bench bench-calls bench-broadcast bench-relay bench-memory bench-scaling bench-pages

setup: $(READY)

$(READY): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[examples,test,lint]'
	touch $@

# Trains on the handwritten digits: a broker, a parameter server and two trainers on this machine.
demo: $(READY)
	$(BIN)/python scripts/zrpc-cluster -n 3 examples/digits/train.py $(ARGS)

# The same without a broker.
demo-brokerless: $(READY)
	$(BIN)/python scripts/zrpc-peers -n 3 examples/digits/train.py $(ARGS)

# In several processes, since tests with workers mostly wait: for example make test TEST_PROCESSES=1 ARGS='-x -k barrier'
test: $(READY)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal tests $(ARGS)

# Mutated messages for every decoder (about 25 minutes), for example: make fuzz COUNT=10000 ARGS='--target tensors'
# With atheris (pip install atheris), which looks for new paths: make fuzz ARGS='--target tensors --atheris 600'
fuzz: $(READY)
	PYTHONWARNINGS=ignore $(BIN)/python -m tests.fuzz.run --count $(COUNT) $(ARGS)

# Workers, their broker and their network fail while they work (10 minutes), for example: make chaos SECONDS=60 SEED=7
chaos: $(READY)
	$(BIN)/python -m tests.chaos.run --seconds $(SECONDS) --seed $(SEED) $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy does not see an editable install: the link gives broker/ the name that it is imported by.
types: $(READY)
	mkdir -p build/types
	ln -sfn ../../broker build/types/zrpc_broker
	MYPYPATH=build/types $(BIN)/mypy -p zrpc -p zrpc_broker
	$(BIN)/mypy examples/digits
	$(BIN)/mypy benchmarks

# Whether a vulnerability is known of a version in constraints.txt; skipped with a line where the registry does not say.
audit: $(READY)
	$(BIN)/python scripts/audit

# PyTorch's own RPC suite (about 5 minutes), for example: make conformance ARGS='-k RpcTest'
conformance: $(READY)
	$(BIN)/python $(CONFORMANCE) $(ARGS)

# What needs a CUDA device: tests, conformance, benchmarks (about 15 minutes). The environment is not made here, since such
# a machine may have no network: BIN is the folder of any python with a CUDA build of torch; what else it needs, see the
# script. For example: make gpu BIN=/usr/bin
gpu:
	scripts/gpu-run $(BIN)/python

.NOTPARALLEL: bench # one at a time, also with -j
# The tables of docs/performance.md, and of other frameworks in docs/scaling.md: measured, written and included in the
# pages (about 35 minutes on 2 cores that do nothing else). For a look, which writes nothing: see benchmarks/README.md.
bench: bench-calls bench-broadcast bench-relay bench-memory bench-pages

bench-calls: $(BENCH_READY)
	$(BIN)/python -m benchmarks --rounds $(ROUNDS) --out $(RESULTS)

bench-broadcast: $(BENCH_READY)
	$(BIN)/python -m benchmarks.broadcast --rounds $(ROUNDS) --out $(RESULTS)

bench-relay: $(BENCH_READY)
	$(BIN)/python -m benchmarks.relay --out $(RESULTS)

bench-memory: $(BENCH_READY)
	$(BIN)/python -m benchmarks.memory --out $(RESULTS)

# The table of docs/scaling.md: start-up, calls and shutdown with 2 to 128 workers (about 6 minutes).
bench-scaling: $(BENCH_READY)
	$(BIN)/python -m benchmarks.scaling --out $(RESULTS)
	$(BIN)/python -m benchmarks.pages

# Puts the files of benchmarks/results into the pages that show them.
bench-pages: $(READY)
	$(BIN)/python -m benchmarks.pages

$(BENCH_READY): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) build out *.egg-info
