# One command each: demo (a video from nothing), serve, test, test-image, lint, bench, proof, protos, lock, clean.

PYTHON ?= python3
BIN := .venv/bin
SNAPSHOTS := .avatar/snapshots
MODELS := .avatar/models
PORT ?= 3000
GRPC_PORT ?= 3001

# OpenMP threads that spin while they wait slow each other down on a busy machine.
export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# The demo's models and jobs; `make serve` serves the same.
export BENTOML_HOME = $(CURDIR)/.avatar
export AVATAR_HOME = $(CURDIR)/.avatar
export BENTOML_DO_NOT_TRACK = 1
# They listen on 127.0.0.1 only, so whoever is here may use them.
export AVATAR_AUTH ?= off

.PHONY: demo serve test test-image lint format bench proof protos lock clean

demo: .venv/installed $(MODELS)
	$(BIN)/python scripts/demo.py
	@echo
	@echo "out/demo.mp4 is ready. Its pixels are coloured noise: the demo's models are tiny and their weights random."
	@echo "Next: 'make serve' serves the same models on port $(PORT); README.md has the calls, and the way to real models."

serve: .venv/installed $(MODELS)
	BENTOML_CONFIG=configuration.yaml AVATAR_GRPC_PORT=$(GRPC_PORT) \
		$(BIN)/bentoml serve --host 127.0.0.1 --port $(PORT)

# Two files of tests at a time: more would stand in each other's way.
test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The image built, pushed, pulled and run. Needs root, and Debian for the container tools, which it installs.
CONTAINER_TOOLS = podman buildah skopeo runc debootstrap docker-registry
test-image: .venv/installed
	for tool in $(CONTAINER_TOOLS); do command -v $$tool > /dev/null || missing=yes; done; test -z "$$missing" || \
		(apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(CONTAINER_TOOLS))
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/image

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/installed
	$(BIN)/python -m benchmarks.load_memory
	$(BIN)/python -m benchmarks.quantization_error
	$(BIN)/python -m benchmarks.job_store
	$(BIN)/python -m benchmarks.long_video --minutes 3 --size 32x32

# That jobs survive, at full length: some hours.
proof: .venv/installed
	$(BIN)/python -m benchmarks.kills
	$(BIN)/python -m benchmarks.mutations
	$(BIN)/python -m benchmarks.clients
	$(BIN)/python -m benchmarks.day
	$(BIN)/python -m benchmarks.runpod_queue

# The generated code is checked in, so that nobody but who changes a .proto needs the compiler.
protos: .venv/installed
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. avatar_api/protos/*.proto

.venv/installed: pyproject.toml requirements.lock requirements-dev.lock
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -r requirements.lock -r requirements-dev.lock
	$(BIN)/pip install --no-deps --no-build-isolation --editable .
	touch $@

$(MODELS): $(SNAPSHOTS)
	$(BIN)/python models/import_models.py --source $(SNAPSHOTS)
	touch $@

$(SNAPSHOTS): | .venv/installed
	$(BIN)/python scripts/make_tiny_snapshots.py $@

# The versions that a fresh environment gets from pyproject.toml. torch's own CUDA libraries are left out: the same pin
# is a CPU build on some machines and a CUDA build on others, and brings what it needs.
LOCKING = .venv-lock/bin/pip
DEPENDENCIES = $(PYTHON) -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(*project$(1))'
NOT_LOCKED = '^torch==\|^nvidia-\|^triton==\|^cuda-\|^pip=='
lock:
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	$(LOCKING) install $$($(call DEPENDENCIES,["dependencies"]))
	(echo torch==2.13.0 && $(LOCKING) freeze | grep -v $(NOT_LOCKED)) > requirements.lock
	$(LOCKING) install $$($(call DEPENDENCIES,["optional-dependencies"]["dev"]))
	$(LOCKING) freeze --all | grep -v $(NOT_LOCKED) | grep -vxFf requirements.lock > requirements-dev.lock
	rm -rf .venv-lock

clean:
	rm -rf .venv .venv-lock .avatar out build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
