# The one task vocabulary. `make demo` and `make test` set up all that they need.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3.11
VENVS := $(if $(ORRERY_VENVS),$(ORRERY_VENVS),.venvs)
export UV_PYTHON_DOWNLOADS := never

# Without environments and without a server's note in var/run there is nothing to end or to tell.
define HAVE_ORRERY
test -x $(VENVS)/airflow/bin/orrery || { \
  if ls var/run/*.json >/dev/null 2>&1; then \
    echo "error: $(VENVS)/airflow is gone while servers may run" >&2; echo "  → make environments, then this again" >&2; exit 64; \
  fi; echo "nothing runs: the environments have not been made"; exit 0; }
endef

.PHONY: help demo demo-rag replay replay-down test test-faults test-gpu up down status check lock bench bench-gpu images environments test-environments clean

help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

environments:
	@$(PYTHON) docker/venv.py airflow ml spark rag

test-environments:
	@$(PYTHON) docker/venv.py --test airflow ml spark cloud rag serve llm dev upstream

demo: environments ## Real flights through the whole loop in Airflow: land, train, promote, score
	@$(PYTHON) docker/venv.py upstream
	@$(VENVS)/airflow/bin/python include/demo/demo.py

demo-rag: ## A knowledge base from its documents to answers with sources; then they change, and so do the answers
	@$(PYTHON) docker/venv.py airflow rag serve
	@$(VENVS)/airflow/bin/python include/demo/demo_rag.py

replay: environments ## A year of flights, month by month: what retraining with a gate is worth, as picture and table
	@$(PYTHON) docker/venv.py upstream
	@$(VENVS)/airflow/bin/python include/demo/replay.py

replay-down: ## Stop the replay's own Airflow and MLflow
	@$(HAVE_ORRERY); $(VENVS)/airflow/bin/python include/demo/replay.py --down

up: environments ## Start Airflow and MLflow on loopback
	@$(VENVS)/airflow/bin/orrery up

down: ## Stop both, and everything they started
	@$(HAVE_ORRERY); $(VENVS)/airflow/bin/orrery down

status: ## Say what runs, where, and how to log in
	@$(HAVE_ORRERY); $(VENVS)/airflow/bin/orrery status

test: test-environments ## Lint, types, architecture, and all tests
	@$(VENVS)/dev/bin/python tests/run.py

test-faults: test-environments ## Only the fault tests, with long counts
	@ORRERY_FAULT_KILLS=$${ORRERY_FAULT_KILLS:-60} $(VENVS)/dev/bin/python tests/run.py --only faults

test-gpu: test-environments ## On a machine with a GPU: every strategy on it, interrupted
	@ORRERY_TEST_GPU=1 $(VENVS)/ml/bin/pytest tests/training/test_cuda.py

check: environments ## Check every project: spec, features.py, model.py
	@$(VENVS)/airflow/bin/orrery check

lock: ## Resolve every environment's pins anew from pyproject.toml
	@$(PYTHON) docker/venv.py --lock

bench: test-environments ## Benchmarks against the obvious alternatives; ONLY=name for one
	@$(PYTHON) docker/venv.py bench
	@$(VENVS)/dev/bin/python tests/benchmarks/run.py $(if $(ONLY),--only $(ONLY),)

bench-gpu: environments ## On a machine with a GPU: bf16 throughput, checkpoints, SIGTERM
	@$(VENVS)/ml/bin/python tests/benchmarks/bench_gpu.py

images: ## Images of all environments, by docker, podman or buildah; ONLY="ml spark", FLAGS="--push …"
	@$(PYTHON) docker/venv.py airflow
	@$(VENVS)/airflow/bin/python docker/images.py $(ONLY) $(FLAGS)

clean: down ## Remove all state (var/); environments stay
	rm -rf var
