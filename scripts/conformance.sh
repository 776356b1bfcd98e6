#!/usr/bin/env bash
# Runs a conformance suite (conformance_wasm, conformance_envoy) and ends with a table: a line for each number of the contract.
set -uo pipefail
cd "$(dirname "$0")/.."

export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/outrigger/target}"
export OUTRIGGER_BIN_DIR="$CARGO_TARGET_DIR/debug"
OUTRIGGER_VENV="$(scripts/setup.sh --venv)"
export OUTRIGGER_VENV
output=$(mktemp)
trap 'rm -f "$output"' EXIT
cargo test --workspace --locked --test "$1" -- --test-threads 4 </dev/null 2>&1 | tee "$output" >&2
status=${PIPESTATUS[0]}
echo
sed -nE 's/^test (([a-z_]+)::)?case_([0-9]+)_([a-z0-9_]+) \.\.\. (ok|FAILED)$/\3 \5 \4 \2/p' "$output" | sort -n |
    awk '{ gsub("_", " ", $3); gsub("_", " ", $4); printf "%4s  %-7s %-40s %s\n", $1, $2, $3, $4 } $2 == "ok" { ok++ } END { printf "%d of %d pass\n", ok, NR }'
exit "$status"
