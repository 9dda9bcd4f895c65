# `make` alone lists the tasks. Tasks that use containers check first that Docker works; CPU=1 runs them without a GPU,
# and ARGS="…" passes options to gpt2box. The other tasks set up a .venv from the hash-checked lock file.
# STACK chooses the image (cu121, cu13x, cpu) or, for `make test`, the lock file to test with the Python version it is for.
python = $(shell ls $$HOME/.pyenv/versions/$(1).*/bin/python$(1) 2>/dev/null | tail -1 | grep . || command -v python$(1))
VENV := .venv$(if $(filter cu%,$(STACK)),-$(STACK))
PYTHON ?= $(or $(call python,$(or $(PYTHON_OF_$(STACK)),3.11)),python3)
PYTHON_OF_cu121 := 3.10
PYTHON_OF_cu13x := 3.13
BIN := $(VENV)/bin

export STACK CPU DATA PROMPT JOB RANKS

.DEFAULT_GOAL := help
.PHONY: help demo image image-verify audit preflight plan shakespeare train-medium finetune multi-gpu prepare sample monitor \
	bench watch report runs tensorboard stop test test-faults test-gpu test-image lint format \
	lock clean

help: ## list these tasks
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /|/' | awk -F'|' '{printf "  make %-14s %s\n", $$1, $$2}'

$(VENV)/ready: requirements/install.sh $(wildcard requirements/$(or $(STACK),cpu)*.lock) pyproject.toml
	@echo "setting up $(VENV) (about 2 minutes, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(if $(filter cu%,$(STACK)),$(BIN)/python -m pip install -qq --require-hashes -r requirements/installer.lock)
	@PATH="$(CURDIR)/$(BIN):$$PATH" UV_SYSTEM_CERTS=1 sh requirements/install.sh $(VENV) $(or $(STACK),cpu)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(VENV)/ready ## train a small GPT on Shakespeare on the CPU (about 2 minutes) and sample from it
	@$(BIN)/gpt2box train demo
	@echo; $(BIN)/gpt2box sample demo --prompt "ROMEO" --max-new-tokens 400

image: ## build the container image (STACK=cu121, cu13x or cpu)
	@scripts/compose.sh image

image-verify: ## build the image twice and compare the contents (STACK as above)
	@scripts/compare_image_builds.sh

preflight: ## check the GPU, driver, memory, disk and network, in the container (JOB=finetune)
	@scripts/compose.sh preflight $(or $(JOB),finetune) $(ARGS)

plan: $(VENV)/ready ## estimate memory, speed and duration: ARGS="--gpu rtx-4070" (JOB=finetune)
	@$(BIN)/gpt2box plan $(or $(JOB),finetune) $(ARGS)

shakespeare: ## train GPT-2 Medium from scratch on Shakespeare: a first test of a GPU
	@DATA= scripts/compose.sh job shakespeare $(ARGS)

train-medium: ## train GPT-2 Medium from scratch on OpenWebText
	@DATA= scripts/compose.sh job openwebtext $(ARGS)

finetune: ## fine-tune the published GPT-2 Medium: DATA=mybook.txt (default: Shakespeare); SIZE=large, xl or lora
	@scripts/compose.sh job finetune$(if $(SIZE),-$(SIZE)) $(ARGS)

multi-gpu: ## train on all GPUs of this machine (JOB=openwebtext; RANKS=2 uses two)
	@scripts/compose.sh multi-gpu $(or $(JOB),openwebtext) $(ARGS)

prepare: ## prepare a dataset in the container: DATA=notes/ or ARGS="openwebtext-10k", ARGS="hub:OWNER/NAME --name mine"
	@scripts/compose.sh run prepare $(ARGS)

sample: ## generate text with the newest run: PROMPT="It was a"
	@scripts/compose.sh run sample $(if $(PROMPT),--prompt "$$PROMPT") $(ARGS)

monitor: ## show the GPU and the newest run, in a second terminal
	@scripts/compose.sh run monitor $(if $(ARGS),monitor $(ARGS))

bench: ## measure training speed, in the container: JOB=shakespeare ARGS="--sweep", ARGS="--share"
	@scripts/compose.sh run bench $(JOB) $(ARGS)

watch: ## serve the dashboard of all runs on http://localhost:8080 (CPU=1 without a GPU)
	@scripts/compose.sh run dashboard

report: ## write report.html into a run's folder: ARGS=RUN
	@scripts/compose.sh run report report $(ARGS)

runs: ## list or compare runs: ARGS="--compare RUN RUN"
	@scripts/compose.sh run report runs $(ARGS)

tensorboard: ## serve TensorBoard for all runs on http://localhost:6006
	@scripts/compose.sh run tensorboard

stop: ## stop all containers; training saves a checkpoint first
	@scripts/compose.sh stop

test: $(VENV)/ready ## run the tests (STACK=cu121 or cu13x: with that lock file)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal --ignore tests/image --ignore tests/gpu

test-faults: $(VENV)/ready ## kill training 300 times, and fail each disk operation of a save (about 30 minutes)
	@OMP_NUM_THREADS=1 FAULT_KILLS=300 FAULT_EVERY=1 $(BIN)/python -m pytest -s tests/faults

test-gpu: $(VENV)/ready ## compare planned with measured memory on a real GPU (STACK=cu121 or cu13x)
	@$(BIN)/python -m pytest -s tests/gpu

test-image: $(VENV)/ready ## build the images and run the Compose profiles without a GPU (about 20 minutes; installs Docker)
	@tests/image/run.sh

lint: $(VENV)/ready ## run ruff, mypy, import-linter, hadolint and shellcheck
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/hadolint Dockerfile
	@$(BIN)/shellcheck entrypoint/*.sh scripts/*.sh tests/image/*.sh requirements/install.sh .ci/run

.venv-audit/ready: requirements/audit.lock
	@$(PYTHON) -m venv .venv-audit
	@.venv-audit/bin/python -m pip install -qq --disable-pip-version-check --require-hashes --requirement $<
	@touch $@

audit: $(VENV)/ready .venv-audit/ready ## check all locked packages for vulnerabilities, and the stack's licenses (STACK=cu121 …)
	@$(BIN)/python scripts/audit.py .venv-audit/bin/pip-audit $(or $(STACK),cpu)

format: $(VENV)/ready ## fix and format the sources with ruff
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

lock: ## update the lock files (needs uv)
	@$(PYTHON) scripts/lock.py $(ARGS)

clean: ## remove .venv and caches, but not volumes/
	@rm -rf .venv .venv-* .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
