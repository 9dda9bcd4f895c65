# `make` alone lists the tasks. Each does its own set-up: a .venv from the hash-checked lock.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo train-medium sample test lint format lock clean

help: ## list the tasks
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /|/' | awk -F'|' '{printf "  make %-14s %s\n", $$1, $$2}'

.venv/ready: requirements/install.sh $(wildcard requirements/cpu*.lock) pyproject.toml
	@echo "setting up .venv (about 2 minutes, once)"
	@$(PYTHON) -m venv .venv
	@sh requirements/install.sh .venv
	@touch $@

demo: .venv/ready ## train a small GPT on Shakespeare on this CPU (about 4 minutes) and read it
	@$(BIN)/gpt2box prepare shakespeare --tokenizer char
	@$(BIN)/gpt2box train demo
	@echo; $(BIN)/gpt2box sample demo --prompt "ROMEO" --max-new-tokens 400

train-medium: .venv/ready ## train GPT-2 Medium from scratch on the complete works (needs a GPU with 12 GB)
	@$(BIN)/gpt2box prepare shakespeare
	@$(BIN)/gpt2box train shakespeare

sample: .venv/ready ## text from the newest run
	@$(BIN)/gpt2box sample

test: .venv/ready ## run the tests
	@$(BIN)/python -m pytest

lint: .venv/ready ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: .venv/ready ## let ruff rewrite the sources
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

lock: ## write the lock files anew (needs uv)
	@cd requirements && $(PYTHON) lock.py

clean: ## remove .venv and caches; volumes stay
	@rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
