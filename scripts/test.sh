#!/usr/bin/env bash
# Runs every test of the workspace, prints the ten slowest, and ends with "N passed, N failed".
# `make test` calls it after building what end-to-end tests start.
set -euo pipefail
cd "$(dirname "$0")/.."

export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/outrigger/target}"
export OUTRIGGER_BIN_DIR="$CARGO_TARGET_DIR/debug"
OUTRIGGER_VENV="$(scripts/setup.sh --venv)"
export OUTRIGGER_VENV
if [ "$(id -u)" != 0 ]; then
    # Network namespaces and nftables need root; only the tests themselves get it, never the build.
    triple=$(rustc -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')
    export "CARGO_TARGET_${triple}_RUNNER=sudo -E"
    echo "==> tests that make network namespaces need root: running tests with sudo"
fi

echo "==> the example filters' own tests"
cargo test --quiet --manifest-path filters/Cargo.toml --target-dir "$CARGO_TARGET_DIR/filters" --lib --locked

# Not below the target directory: a run must never read the report of an earlier one.
report=$(mktemp -d)
trap 'rm -rf "$report"' EXIT
status=0
if cargo nextest --version >/dev/null 2>&1; then
    echo "==> cargo nextest run --workspace"
    # nextest's store is below the checkout, wherever the target directory is.
    junit=target/nextest/default/junit.xml
    rm -f "$junit"
    cargo nextest run --workspace --locked --no-tests pass "$@" </dev/null || status=$?
    scripts/report.py junit "$junit" || status=1
else
    echo "==> cargo test --workspace (cargo-nextest, where installed, is faster and times each test)"
    cargo test --workspace --lib --bins --tests --locked --no-fail-fast "$@" </dev/null 2>&1 |
        tee "$report/output" || status=$?
    scripts/report.py cargo "$report/output" || status=1
fi
exit "$status"
