#!/usr/bin/env bash
# What a machine can say of the code without running it.
set -euo pipefail
cd "$(dirname "$0")/.."

echo "==> format"
cargo fmt --all --check

echo "==> clippy, warnings denied"
cargo clippy --workspace --all-targets --locked -- -D warnings

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
