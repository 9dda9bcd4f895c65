# `make` alone lists the tasks. Those that use containers look first for Docker and say what is missing; CPU=1 does without
# a GPU, ARGS="…" are options for gpt2box. The others do their own set-up: a .venv from the hash-checked lock.
# STACK is the image's (cu121, cu13x, cpu), and for `make test` the lock to test, on the Python that it is for.
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

help: ## list the tasks
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /|/' | awk -F'|' '{printf "  make %-14s %s\n", $$1, $$2}'

$(VENV)/ready: requirements/install.sh $(wildcard requirements/$(or $(STACK),cpu)*.lock) pyproject.toml
	@echo "setting up $(VENV) (about 2 minutes, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(if $(filter cu%,$(STACK)),$(BIN)/python -m pip install -qq --require-hashes -r requirements/installer.lock)
	@PATH="$(CURDIR)/$(BIN):$$PATH" UV_SYSTEM_CERTS=1 sh requirements/install.sh $(VENV) $(or $(STACK),cpu)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(VENV)/ready ## train a small GPT on Shakespeare on this CPU (about 2 minutes) and read it
	@$(BIN)/gpt2box train demo
	@echo; $(BIN)/gpt2box sample demo --prompt "ROMEO" --max-new-tokens 400

image: ## build the container image (STACK=cu121, cu13x or cpu)
	@scripts/box.sh image

image-verify: ## build it twice and compare what is in it (STACK as above)
	@scripts/image-verify.sh

preflight: ## check the GPU, driver, memory, disk and network, in the container (JOB=finetune)
	@scripts/box.sh preflight $(or $(JOB),finetune) $(ARGS)

plan: $(VENV)/ready ## what fits a card, how fast, how long: ARGS="--gpu rtx-4070" (JOB=finetune)
	@$(BIN)/gpt2box plan $(or $(JOB),finetune) $(ARGS)

shakespeare: ## train GPT-2 Medium from scratch on Shakespeare: the first test of a card
	@DATA= scripts/box.sh job shakespeare $(ARGS)

train-medium: ## train GPT-2 Medium from scratch on OpenWebText
	@DATA= scripts/box.sh job openwebtext $(ARGS)

finetune: ## fine-tune the published GPT-2 Medium: DATA=mybook.txt (Shakespeare without it); SIZE=large, xl or lora
	@scripts/box.sh job finetune$(if $(SIZE),-$(SIZE)) $(ARGS)

multi-gpu: ## a job on all cards of this machine together (JOB=openwebtext; RANKS=2 takes two)
	@scripts/box.sh multi-gpu $(or $(JOB),openwebtext) $(ARGS)

prepare: ## a dataset alone, in the container: DATA=notes/ or ARGS="openwebtext-10k", ARGS="hub:OWNER/NAME --name mine"
	@scripts/box.sh run prepare $(ARGS)

sample: ## text from the newest run: PROMPT="It was a"
	@scripts/box.sh run sample $(if $(PROMPT),--prompt "$$PROMPT") $(ARGS)

monitor: ## watch the card and the run, in a second terminal
	@scripts/box.sh run monitor $(if $(ARGS),monitor $(ARGS))

bench: ## how fast this machine trains, in the container: JOB=shakespeare ARGS="--sweep", ARGS="--share"
	@scripts/box.sh run bench $(JOB) $(ARGS)

watch: ## all runs, live, on http://localhost:8080 (CPU=1 without a card)
	@scripts/box.sh run dashboard

report: ## a run on one page, report.html in its folder: ARGS=RUN
	@scripts/box.sh run report report $(ARGS)

runs: ## the runs and how they went: ARGS="--compare RUN RUN"
	@scripts/box.sh run report runs $(ARGS)

tensorboard: ## the curves of all runs, on http://localhost:6006
	@scripts/box.sh run tensorboard

stop: ## what runs in a container saves and ends
	@scripts/box.sh stop

test: $(VENV)/ready ## run the tests (STACK=cu121 or cu13x: with that lock)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal --ignore tests/image --ignore tests/gpu

test-faults: $(VENV)/ready ## 300 kills at random moments, and a disk that fails at each call of a save (about half an hour)
	@OMP_NUM_THREADS=1 FAULT_KILLS=300 FAULT_EVERY=1 $(BIN)/python -m pytest -s tests/faults

test-gpu: $(VENV)/ready ## with STACK=cu121 or cu13x: planned memory against a real card's
	@$(BIN)/python -m pytest -s tests/gpu

test-image: $(VENV)/ready ## build the images and run the profiles for real, without a GPU (about 20 minutes; installs Docker)
	@tests/image/run.sh

lint: $(VENV)/ready ## ruff, mypy, hadolint and shellcheck
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/hadolint Dockerfile
	@$(BIN)/shellcheck scripts/*.sh tests/image/*.sh requirements/install.sh .ci/run

.venv-audit/ready: requirements/audit.lock
	@$(PYTHON) -m venv .venv-audit
	@.venv-audit/bin/python -m pip install -qq --disable-pip-version-check --require-hashes --requirement $<
	@touch $@

audit: $(VENV)/ready .venv-audit/ready ## known vulnerabilities of all locked packages, licences of the stack's (STACK=cu121 …)
	@$(BIN)/python requirements/audit.py .venv-audit/bin/pip-audit $(or $(STACK),cpu)

format: $(VENV)/ready ## let ruff rewrite the sources
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

lock: ## write the lock files anew (needs uv)
	@cd requirements && $(PYTHON) lock.py $(ARGS)

clean: ## remove .venv and caches; volumes stay
	@rm -rf .venv .venv-* .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
