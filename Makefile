# Everything is built into one target directory outside the tree, so that several checkouts share it.
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/outrigger
export CARGO_TARGET_DIR ?= $(CACHE)/target
# rustup's proxies, when the shell has not been restarted since Rust was installed.
export PATH := $(PATH):$(HOME)/.cargo/bin
SHELL := /bin/bash

.DEFAULT_GOAL := help
.PHONY: help setup build filters release demo test chaos lint bench bench-budget bench-scale conformance-wasm conformance-envoy fuzz

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install what building and testing need (demo, test, lint and bench do it themselves)
	@scripts/setup.sh

filters: setup
	@echo "==> building the example filters for wasm32-wasip1"
	@if [ -x filters/build.sh ]; then filters/build.sh; fi

build: setup filters ## the three binaries, unoptimised
	@echo "==> building outrigger-proxy, outrigger-control and outrigger into $$CARGO_TARGET_DIR/debug"
	@cargo build --workspace --bins --locked

release: setup ## the three binaries as they are released, the proxy laid out by a profile of its load: built twice, half an hour on 2 CPUs
	@scripts/release.sh

demo: build ## a mesh of four services, with load and a live view; Ctrl-C stops it (ARGS=--check: unattended)
	@"$$CARGO_TARGET_DIR/debug/outrigger" demo $(ARGS)

test: build ## every test, end to end included; prints the ten slowest
	@scripts/test.sh

fuzz: setup ## the filters' host under arbitrary modules, the reader of responses under arbitrary bytes (SECS=60; SEED= replays)
	@FUZZ_SECS="$(or $(SECS),60)" FUZZ_SEED="$(SEED)" cargo test --workspace --locked --test fuzz_host --test fuzz_http1 -- --nocapture

chaos: build ## filters that trap, loop and leak under load; what a filter costs in memory (CHAOS_SECS= of load); prints the figures
	@OUTRIGGER_BIN_DIR="$$CARGO_TARGET_DIR/debug" cargo test --workspace --locked --test chaos -- --nocapture --test-threads 1

lint: setup ## format, clippy with warnings denied, layers, status table
	@scripts/lint.sh

bench: release ## the comparison with Envoy, HAProxy and nginx (ARGS= for bench/bench.py)
	@scripts/setup.sh --bench
	@filters/build.sh bench/wasm
	@OUTRIGGER_BIN="$$CARGO_TARGET_DIR/dist/outrigger-proxy" WASM_FILTER="$(CACHE)/filters/bench_filter.wasm" \
		"$$(scripts/setup.sh --venv)/bin/python" bench/bench.py --json "$(CACHE)/bench/results.json" $(ARGS)
	@echo "==> results: $(CACHE)/bench/results.json"

bench-budget: setup ## instructions and allocations per request, against bench/budget.json (ARGS=--update)
	@echo "==> building the proxy with symbols, and the core's decisions"
	@cargo build --workspace --bin outrigger-proxy --bin core-budget --locked --profile profiling
	@filters/build.sh bench/wasm
	@WASM_FILTER="$(CACHE)/filters/bench_filter.wasm" bench/budget.py $(ARGS)

bench-scale: setup ## the control plane with 1,000 proxies and up to 5,000 services (ARGS= for outrigger-scale)
	@echo "==> building the release control plane, and the load tool"
	@cargo build --workspace --bin outrigger-control --bin outrigger-scale --locked --release
	@mkdir -p "$(CACHE)/bench"
	@"$$CARGO_TARGET_DIR/release/outrigger-scale" --control "$$CARGO_TARGET_DIR/release/outrigger-control" --curve \
		--json "$(CACHE)/bench/scale.json" $(ARGS)
	@echo "==> results: $(CACHE)/bench/scale.json"

conformance-wasm: setup ## the Proxy-Wasm cases of the contract on this host, by number
	@echo "==> building outrigger-proxy and the guests"
	@cargo build --workspace --bins --locked
	@scripts/conformance.sh conformance_wasm

conformance-envoy: setup ## the same cases on Envoy; a difference that is not listed fails
	@scripts/conformance.sh conformance_envoy

# Names that others may rely on already (DESIGN section 9), built in later steps.
LATER := conformance sim
.PHONY: $(LATER)
$(LATER):
	@echo "make $@: not built yet" >&2; exit 1
