# make demo    the main job, on the in-process broker; over RabbitMQ with RPCQ_URL=amqp://...
# make web     a page at http://127.0.0.1:8000 that sends requests and shows their answers live; the same
# make example-scores  an example system at http://127.0.0.1:8000, on a broker of its own, or on that of RPCQ_URL
# make test    all tests, on a real RabbitMQ too (tests/support/broker.py says where it comes from)
# make test-faults  every fault of docs/reliability.md, and all else that takes long
# make test-examples  all tests of the example systems, with a crash in the middle of each
# make soak    mixed load for 10 minutes while faults strike at random; ARGS='--minutes 1 --seed 7 --nodes 3'
# make soak-jobs  100 000 jobs while workers are killed, some jobs are poison, and the broker is restarted; ARGS='--seed 7'
# make soak-outbox  20 000 orders through an outbox and an inbox while every part is killed; ARGS='--seed 7'
# make check   format, lint, types, structure, the documentation, and known holes of the dependencies
# make docs    the documentation at http://127.0.0.1:8000, built again at every change
# make fmt     fix what the checks can fix
# make bench-jobs  jobs against Celery, Taskiq, Dramatiq and FastStream on the same broker; takes about 6 minutes
# make bench   against aio-pika's RPC, FastStream and rabbitmq-c on the same broker, nats-py and grpc.aio; takes about 8 minutes

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := rpcq rpcq_pytest.py producer_service consumer_service tests benchmarks docs docker examples

.PHONY: help demo web test test-examples test-faults soak soak-jobs soak-outbox check docs fmt bench bench-jobs clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'rpcq needs Python 3.11 or later; name one: make PYTHON=python3.12 ...' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo 'Python has no venv module here: installing the package python3-venv' >&2; \
			apt-get update -qq && apt-get install -y -qq python3-venv && $(PYTHON) -m venv $(VENV); \
		else echo 'Python has no venv module here: install the package python3-venv' >&2; exit 1; fi; }

## One stamp for each set of extras: installed again when pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@echo 'installing rpcq and its extras: $*'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

demo: $(VENV)/.installed-bench $(VENV)/.installed-uvloop
	@$(BIN)/python -m producer_service --requests 10000 --concurrency 10000 --with-worker

web: $(VENV)/.installed-web $(VENV)/.installed-bench $(VENV)/.installed-metrics $(VENV)/.installed-uvloop
	$(BIN)/python -m producer_service serve $(ARGS)

## Without a broker in RPCQ_URL or RPCQ_URL_FILE, one is started, in a container or as a node, and taken away at the end.
## A name may have hyphens, where its folder has underscores. Black Friday gets a PostgreSQL too, unless SHOP_DATABASE is set.
example-%: $(VENV)/.installed-test $(VENV)/.installed-uvloop
	@test -f examples/$(subst -,_,$*)/__main__.py || { echo 'there is no example $*; there are: ' \
		$(subst _,-,$(patsubst examples/%/__main__.py,%,$(wildcard examples/*/__main__.py))) >&2; exit 2; }
	@if [ -n "$$RPCQ_URL$$RPCQ_URL_FILE" ]; then exec $(BIN)/python -m examples.$(subst -,_,$*) $(ARGS); \
	else exec $(BIN)/python tests/support/broker.py $(if $(filter black-friday,$*),--postgres SHOP_DATABASE) -- \
		$(BIN)/python -m examples.$(subst -,_,$*) $(ARGS); fi

## Takes the picture of an example's page for the docs; look at it before it is committed.
picture-%: $(VENV)/.installed-test $(VENV)/.installed-uvloop
	PYTHONPATH=.:tests $(BIN)/python tests/support/broker.py -- $(BIN)/python tests/support/pictures.py $*

test: $(VENV)/.installed-test $(VENV)/.installed-uvloop $(VENV)/.installed-docs
## In asyncio's debug mode, which `make test-faults` has, the tests take a third longer.
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -o asyncio_debug=false $(ARGS)

test-faults: $(VENV)/.installed-test $(VENV)/.installed-uvloop $(VENV)/.installed-docs
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile tests/faults tests/security tests/conformance tests/outbox \
		tests/unit/cli tests/unit/observability tests/docs tests/examples -m '' $(ARGS)

test-examples: $(VENV)/.installed-test $(VENV)/.installed-uvloop
	$(BIN)/python -m pytest examples tests/examples -m '' $(ARGS)

soak: $(VENV)/.installed-test $(VENV)/.installed-uvloop
	PYTHONPATH=tests $(BIN)/python -m soak $(ARGS)

soak-jobs: $(VENV)/.installed-test $(VENV)/.installed-uvloop
	PYTHONPATH=tests $(BIN)/python -m soak.jobs $(ARGS)

soak-outbox: $(VENV)/.installed-test $(VENV)/.installed-uvloop
	PYTHONPATH=tests $(BIN)/python -m soak.outbox $(ARGS)

## The tests' extras too: types are checked in all that imports them.
check: $(VENV)/.installed-test $(VENV)/.installed-uvloop $(VENV)/.installed-check $(VENV)/.installed-docs
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@if $(BIN)/python tests/support/lowest.py --reachable; then \
		$(BIN)/pip-audit --progress-spinner off --skip-editable && \
		$(BIN)/python tests/support/lowest.py >$(VENV)/lowest.txt && \
		$(BIN)/pip-audit --progress-spinner off --no-deps --disable-pip --requirement $(VENV)/lowest.txt; \
	else echo 'pypi.org does not tell known holes here: the dependencies are NOT audited for known holes'; fi

## With npm, the site has Mermaid itself, and can be read offline; without it, pages with diagrams load it from unpkg.com.
MERMAID := mermaid-11.17.2
$(VENV)/$(MERMAID).js:
	@cd $(VENV) && npm pack --silent $(subst -,@,$(MERMAID)) >/dev/null && \
		tar -xzOf $(MERMAID).tgz package/dist/mermaid.min.js >$(MERMAID).part && \
		mv $(MERMAID).part $(MERMAID).js && rm $(MERMAID).tgz

docs: $(VENV)/.installed-docs
	@$(MAKE) --no-print-directory $(VENV)/$(MERMAID).js || \
		echo 'npm cannot get Mermaid here: diagrams are loaded from unpkg.com while a page is read' >&2
	RPCQ_DOCS_MERMAID="$$(ls $(VENV)/$(MERMAID).js 2>/dev/null)" NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve $(ARGS)

fmt: $(VENV)/.installed-check
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(VENV)/.installed-peers $(VENV)/.installed-test $(VENV)/.installed-uvloop
	$(BIN)/python benchmarks/import_time.py
	$(BIN)/python tests/support/broker.py -- $(BIN)/python -m benchmarks.peers $(ARGS)

bench-jobs: $(VENV)/.installed-peers $(VENV)/.installed-test $(VENV)/.installed-uvloop
	$(BIN)/python tests/support/broker.py -- $(BIN)/python -m benchmarks.jobs $(ARGS)

clean:
	rm -rf $(VENV) build .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
