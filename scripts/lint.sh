#!/usr/bin/env bash
# What a machine can say of the code without running it.
set -euo pipefail
cd "$(dirname "$0")/.."
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/outrigger/target}"

echo "==> format"
cargo fmt --all --check
cargo fmt --all --check --manifest-path filters/Cargo.toml

echo "==> clippy, warnings denied"
cargo clippy --workspace --all-targets --locked -- -D warnings
cargo clippy --manifest-path filters/Cargo.toml --target-dir "$CARGO_TARGET_DIR/filters" --all-targets --locked -- -D warnings

echo "==> layers: outrigger-core has no IO dependency"
# Both normal and build dependencies of the library, features as the workspace uses them.
if cargo tree -p outrigger-core -e normal --locked --prefix none |
    grep -E '^(tokio|hyper|tonic|wasmtime|mio|socket2)([ -]|$)'; then
    echo "outrigger-core may not depend on these: decisions live there, IO in the crates above" >&2
    exit 1
fi

echo "==> no test is skipped"
if git grep -nE '#\[ignore' -- '*.rs'; then
    echo "a test is run or removed, never ignored" >&2
    exit 1
fi

echo "==> docs/status.md names tests that exist"
scripts/status.py
