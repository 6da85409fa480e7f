# Needs Python 3.11 and make; everything else goes into the virtual environment $(VENV).
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH_READY := $(VENV)/.bench-ready
TEST_PROCESSES ?= 3
CONFORMANCE := ../shared/conformance/run.py

.PHONY: setup demo demo-brokerless test lint format types conformance gpu bench bench-scaling clean

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

# PyTorch's own RPC suite (about 5 minutes), for example: make conformance ARGS='-k RpcTest'
conformance: $(READY)
	$(BIN)/python $(CONFORMANCE) $(ARGS)

# What needs a CUDA device: tests, conformance, benchmarks (about 15 minutes). The environment is not made here, since such
# a machine may have no network: BIN is the folder of any python with a CUDA build of torch; what else it needs, see the
# script. For example: make gpu BIN=/usr/bin
gpu:
	scripts/gpu-run $(BIN)/python

# zrpc beside TensorPipe, RPyC, gRPC and Ray (about 10 minutes), for example: make bench ARGS='--rounds 1 --quick'
bench: $(BENCH_READY)
	$(BIN)/python -m benchmarks $(ARGS)

# Start-up, calls and shutdown with 2 to 128 workers (about 6 minutes).
bench-scaling: $(BENCH_READY)
	$(BIN)/python -m benchmarks.scaling $(ARGS)

$(BENCH_READY): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) build out *.egg-info
