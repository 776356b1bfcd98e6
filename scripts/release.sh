#!/usr/bin/env bash
# Builds the three binaries as they are released, into $CARGO_TARGET_DIR/dist. The proxy is built twice: first one that counts what its code does
# under the load of bench/, then the one that is laid out by these counts (profile-guided optimisation): a sidecar spends more time on
# fetching its code than on running it. The counts are kept until something that is built changes.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:$HOME/.cargo/bin"

cache="${XDG_CACHE_HOME:-$HOME/.cache}/outrigger"
target="${CARGO_TARGET_DIR:-$cache/target}"
host=$(rustc -vV | sed -n 's/^host: //p')
say() { echo "==> $*"; }
fail() {
    echo "release: $*" >&2
    exit 1
}

# What the profile is of, committed or not; the build's settings too: with others, functions have other names, and their counts are ignored.
sources=$( (rustc -vV && find Cargo.toml Cargo.lock scripts/release.sh proto proxy bench/wasm \
    \( -name '*.rs' -o -name '*.proto' -o -name Cargo.toml -o -name Cargo.lock -o -name release.sh \) -print0 |
    sort -z | xargs -0 sha256sum) | sha256sum | cut -c 1-16)
profile="$target/pgo/$sources.profdata"

# proxy FLAGS DIR: flags for the compiler. A target that is named keeps them away from what runs while building.
proxy() {
    RUSTFLAGS="$1" CARGO_TARGET_DIR="$2" cargo build --workspace --bin outrigger-proxy --locked --release --target "$host"
}

say "building outrigger-control and outrigger"
CARGO_TARGET_DIR="$target" cargo build --workspace --bin outrigger-control --bin outrigger --locked --release

if ! [ -e "$profile" ]; then
    profdata=$(scripts/setup.sh --profdata)
    counts="$target/pgo/counts"
    say "building a proxy that counts (1 of 2)"
    proxy "-Cprofile-generate=$counts" "$target/pgo/counting"
    mkdir -p "$target/pgo/bin"
    cp "$target/pgo/counting/$host/release/outrigger-proxy" "$target/release/outrigger-control" "$target/release/outrigger" "$target/pgo/bin"
    # What was built may have counted as well.
    rm -rf "$counts"
    say "running the load of bench/ on it: two minutes"
    filters/build.sh bench/wasm
    log="$target/pgo/load.log"
    OUTRIGGER_BIN="$target/pgo/bin/outrigger-proxy" WASM_FILTER="$cache/filters/bench_filter.wasm" \
        "$(scripts/setup.sh --venv)/bin/python" bench/bench.py --peers outrigger --reps 1 --secs 1 \
        --scenarios h1,h2,wasm-added,conn-rate,tail-latency,tcp,websocket,grpc,access-log,overload >"$log" 2>&1 ||
        { tail -n 20 "$log" >&2; fail "the load did not run: $log"; }
    grep -iE "invalid|skipped" "$log" || true
    [ -n "$(ls "$counts" 2>/dev/null)" ] || fail "the proxy wrote no counts: $log"
    "$profdata" merge -o "$profile.new" "$counts"
    rm -rf "$counts" "$target"/pgo/*.profdata
    mv "$profile.new" "$profile"
fi

say "building the proxy by its profile (2 of 2)"
# What the load never ran of a function lies elsewhere: what runs is in fewer pages and lines.
proxy "-Cprofile-use=$profile -Cllvm-args=-enable-split-machine-functions" "$target/pgo/by-profile"
mkdir -p "$target/dist"
# One that runs is replaced, not written to.
cp --remove-destination "$target/pgo/by-profile/$host/release/outrigger-proxy" "$target/release/outrigger-control" "$target/release/outrigger" "$target/dist"
say "built $target/dist: $(cd "$target/dist" && du -h --apparent-size outrigger-proxy outrigger-control outrigger | awk '{ printf "%s%s %s", sep, $2, $1; sep = ", " }')"
