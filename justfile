# The contributor's whole vocabulary. `just setup` first; `just --list` tells the rest.

python := ".venv/bin/python"

# A virtual environment with everything that the other recipes need.
setup:
    test -d .venv || python3 -m venv .venv
    {{python}} -m pip install -q -e ".[dev]"

# Format, lint, types, layers.
check:
    {{python}} -m ruff format --check .
    {{python}} -m ruff check .
    {{python}} -m basedpyright
    {{python}} -m pytest -q tests/unit/test_layers.py tests/unit/test_public_api.py

# What needs nothing but Python: README's test command.
test *ARGS:
    {{python}} -m pytest {{ARGS}}

# The contract on the in-memory etcd and, by every road, on each etcd named in ETCD_INFRA_TEST_ETCDS (paths, with colons).
contract *ARGS:
    {{python}} -m pytest tests/contract -m "slow or not slow" {{ARGS}}

# Every etcd named in ETCD_INFRA_TEST_ETCDS by every road: the contract, the roads' own tests, the primitives; a table.
matrix:
    {{python}} -m tests.matrix

# Everything on real servers, the slow tests included.
integration *ARGS:
    {{python}} -m pytest tests/integration -m "slow or not slow" {{ARGS}}

# Locks under simulated faults: `just sim 17` replays one seed, `just sim --seeds 3000` runs many.
sim *ARGS:
    {{python}} -m tests.simulation.running {{ARGS}}

# Very many seeds, on two processors.
soak *ARGS:
    nice -n 10 {{python}} -m tests.simulation.running --first 10000 --seeds 100000 --jobs 2 {{ARGS}}

# The wire format on each protobuf major that is allowed, each in an environment of its own.
protobuf-matrix:
    .ci/protobuf-matrix

# Locks beside other clients, each in an environment of its own.
bench *ARGS:
    {{python}} benchmarks/locks.py {{ARGS}}

# State and counters beside other clients.
bench-state *ARGS:
    {{python}} benchmarks/state.py {{ARGS}}

# Elections and the kinds of locks beside etcd's own lock service and kazoo.
bench-elections *ARGS:
    {{python}} benchmarks/elections.py {{ARGS}}

# The roads to etcd beside other clients' own.
bench-transports *ARGS:
    {{python}} benchmarks/transports.py {{ARGS}}

# Topics beside other clients' put and watch.
bench-topics *ARGS:
    {{python}} benchmarks/topics.py {{ARGS}}

# The bugs of naive implementations, put into a copy of the tree: some test must fail with each of them.
mutants *ARGS:
    {{python}} -m tests.mutants.run {{ARGS}}

# Branch coverage of the package.
cov:
    {{python}} -m pip install -q coverage
    {{python}} -m coverage run -m pytest -n 0
    {{python}} -m coverage report

# A throw-away etcd in the foreground.
etcd:
    {{python}} -m etcd_infra dev-server
