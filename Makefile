# make demo | test | e2e | lint | bench | bench-gate | soak | build | deb | clean
#
# Everything lives in .venv. Each step leaves a stamp there, so a second run only redoes what changed.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
IDP := tests/support/idp
CRATES := src/kohakuriver-tunnel src/kohakuriver-sshd
WEB := src/kohakuriver-web
TESTS ?= tests --ignore=tests/e2e
PYTEST_ARGS ?=
PYTEST_WORKERS ?= 3
# The suite starts hundreds of programs: each would compile its modules anew.
unexport PYTHONDONTWRITEBYTECODE
# What is compiled has steps of its own.
ALONE := KOHAKURIVER_SKIP_CARGO=1 KOHAKURIVER_SKIP_NPM=1
PIP_INSTALL := PYTHONWARNINGS=ignore $(BIN)/python -m pip install -q --disable-pip-version-check

crate_sources = $(shell find $(1)/src $(1)/.cargo $(1)/Cargo.toml $(1)/Cargo.lock -type f 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help demo test test-asyncio test-sanitized test-api test-rust test-web e2e lint docs house audit audit-online sbom bench bench-micro bench-gate soak build deb clean install

help: ## this list
	@sed -n 's/^\([a-z][a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

demo: install ## a small cluster on this machine, a task with a web page, and a forward to it; until Ctrl-C
	$(BIN)/kohakuriver demo

test: install ## the whole suite but the browser tests (those: make e2e)
	scripts/system-packages test
	@$(MAKE) --no-print-directory $(STAMPS)/idp
	scripts/with-engine scripts/run-tests $(BIN)/python $(PYTEST_WORKERS) $(TESTS) $(PYTEST_ARGS)

test-asyncio: install ## the same suite on the standard library's event loop
	scripts/system-packages test
	@$(MAKE) --no-print-directory $(STAMPS)/idp
	KOHAKURIVER_LOOP=asyncio scripts/with-engine scripts/run-tests $(BIN)/python $(PYTEST_WORKERS) $(TESTS) $(PYTEST_ARGS)

test-sanitized: install ## the tests of the extensions on a build with AddressSanitizer and UndefinedBehaviorSanitizer
	scripts/test-sanitized $(BIN)/python

test-rust: ## the own tests of the tunnel client and of the SSH server
	scripts/system-packages test
	for crate in $(CRATES); do scripts/test-crate $$crate || exit 1; done

test-web: install ## the own tests of the dashboard
	cd $(WEB) && npm test --silent

test-api: install $(STAMPS)/audit ## schemathesis on the HTTP API of a real host
	$(BIN)/python -m tests.conformance.api_fuzz

audit: install $(STAMPS)/audit ## what needs no network: bandit on our code
	$(BIN)/bandit -q -c pyproject.toml -r src/kohakuriver

audit-online: install $(STAMPS)/audit ## known weaknesses of what we depend on: pip-audit, npm audit, and cargo-deny (which must be installed)
	$(BIN)/python -m pip freeze --exclude-editable | grep -v '^kohakuriver' >$(STAMPS)/frozen.txt
	$(BIN)/pip-audit --strict --disable-pip --no-deps -r $(STAMPS)/frozen.txt
	cd $(WEB) && npm audit
	for crate in $(CRATES); do (cd $$crate && cargo deny --locked --config ../../deny.toml check) || exit 1; done

sbom: install $(STAMPS)/audit ## what the package and the programs in it are made of: CycloneDX, in sbom/
	scripts/sbom $(BIN)/python

e2e: install $(STAMPS)/e2e ## the dashboard, JupyterLab, TensorBoard and Vite in a real browser
	scripts/system-packages test e2e
	@$(MAKE) --no-print-directory $(STAMPS)/idp
	scripts/with-engine scripts/try-tests $(BIN)/python tests/e2e $(PYTEST_ARGS)

lint: install ## ruff, mypy, stubs against the extensions, tsc, rustfmt, clippy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest kohakuriver._frame kohakuriver._files
	cd $(WEB) && npm run --silent check
	for crate in $(CRATES); do \
		(cd $$crate && cargo fmt --check && cargo clippy --locked --all-targets -- -D warnings) || exit 1; done

docs: install $(STAMPS)/docs ## the documentation as a site, in site/; a link or an anchor that leads nowhere fails
	PYTHONPATH=. $(BIN)/mkdocs build --strict --quiet

house: install ## import circles, large classes, long functions, code that stands twice, tests without a name
	$(BIN)/python scripts/house.py

bench-micro: install ## the hot path beside its plain twin, call by call
	$(BIN)/python -m pytest bench/test_frame.py --benchmark-columns=median,ops --benchmark-group-by=group $(PYTEST_ARGS)

bench: install ## micro benchmarks, then the whole chain beside its baselines: table, JSON, plot
	scripts/system-packages bench
	mkdir -p bench/results
	$(BIN)/python -m pytest bench --benchmark-json=bench/results/micro.json $(PYTEST_ARGS)
	$(BIN)/python -m bench.limits --kohakuriver $(BIN)/kohakuriver --output bench/results
	$(BIN)/python -m bench.ssh_proxy --kohakuriver $(BIN)/kohakuriver --output bench/results
	$(BIN)/python -m bench.over_tls --kohakuriver $(BIN)/kohakuriver --output bench/results
	$(BIN)/python -m bench.chain --kohakuriver $(BIN)/kohakuriver --output bench/results

bench-gate: install ## the bounds of bench/gates.toml, as CI checks them
	scripts/system-packages bench
	$(BIN)/python -m bench.limits --kohakuriver $(BIN)/kohakuriver --gate bench/gates.toml
	$(BIN)/python -m bench.ssh_proxy --kohakuriver $(BIN)/kohakuriver --gate bench/gates.toml
	$(BIN)/python -m bench.over_tls --kohakuriver $(BIN)/kohakuriver --gate bench/gates.toml
	$(BIN)/python -m bench.chain --kohakuriver $(BIN)/kohakuriver --gate bench/gates.toml

SECONDS ?= 900
soak: install ## mixed load for 15 minutes (SECONDS=3600: an hour), in which nothing may grow: JSON, plot
	$(BIN)/python -m bench.soak --kohakuriver $(BIN)/kohakuriver --seconds $(SECONDS) --output bench/results

build: ## sdist and wheel in dist/, by the tools that scripts/build-requirements.txt names by hash
	rm -rf dist $(VENV)-build
	$(PYTHON) -m venv $(VENV)-build
	$(VENV)-build/bin/pip install -q --disable-pip-version-check --require-hashes -r scripts/build-requirements.txt
	$(VENV)-build/bin/python -m build --no-isolation

deb: build ## the wheel as a Debian package, with units for systemd, in dist/
	scripts/build-deb dist/*.whl

clean: ## everything that these commands made
	rm -rf $(IDP)/node_modules .venv* build dist sbom site src/*.egg-info bench/results .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .schemathesis
	rm -rf src/kohakuriver/bin src/kohakuriver/dashboard src/kohakuriver/*.c src/kohakuriver/*.so $(CRATES:=/target)
	rm -rf $(WEB)/node_modules $(WEB)/dist
	find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

install: $(STAMPS)/package $(STAMPS)/extension $(STAMPS)/client $(STAMPS)/sshd $(STAMPS)/dashboard

# After scripts/system-packages, which knows where npm comes from.
$(STAMPS)/idp: $(IDP)/package.json $(IDP)/package-lock.json
	npm ci --prefix $(IDP) --silent
	touch $@

$(STAMPS)/venv:
	PYTHON=$(PYTHON) scripts/system-packages build
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --upgrade pip 'setuptools>=77' 'cython>=3.1'
	mkdir -p $(STAMPS)
	touch $@

# The compiled parts have stamps of their own: a changed source file needs no new installation.
$(STAMPS)/package: $(STAMPS)/venv pyproject.toml setup.py Makefile
	$(ALONE) $(PIP_INSTALL) --no-build-isolation -e '.[dev]'
	touch $@

$(STAMPS)/extension: $(STAMPS)/package setup.py $(wildcard src/kohakuriver/_f*.p[xy][xdi])
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

$(STAMPS)/client: $(STAMPS)/venv setup.py $(call crate_sources,src/kohakuriver-tunnel)
	$(BIN)/python setup.py -q build_programs --inplace --only=tunnel-client
	touch $@

$(STAMPS)/sshd: $(STAMPS)/venv setup.py $(call crate_sources,src/kohakuriver-sshd)
	$(BIN)/python setup.py -q build_programs --inplace --only=tunnel-sshd
	touch $@

$(STAMPS)/dashboard: $(STAMPS)/venv setup.py $(shell find $(WEB) -name node_modules -prune -o -name dist -prune -o -type f -print 2>/dev/null)
	$(BIN)/python setup.py -q build_dashboard --inplace
	touch $@

$(STAMPS)/audit: $(STAMPS)/package
	$(ALONE) $(PIP_INSTALL) --no-build-isolation -e '.[audit]'
	touch $@

$(STAMPS)/docs: $(STAMPS)/package
	KOHAKURIVER_SKIP_CARGO=1 $(PIP_INSTALL) --no-build-isolation -e '.[docs]'
	touch $@

$(STAMPS)/e2e: $(STAMPS)/package
	$(ALONE) $(PIP_INSTALL) --no-build-isolation -e '.[e2e]'
	touch $@
