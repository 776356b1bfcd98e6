#!/bin/sh
# Builds filters: those of this directory, or of the directories named (`build.sh bench/wasm`), into ~/.cache/outrigger/filters/*.wasm
# (OUTRIGGER_FILTERS_DIR names another directory; a file there can be the `module.file` of a WasmFilter). A directory is
#   Rust             with Cargo.toml, a workspace or one crate: for wasm32-wasip1, with the toolchain's own target if there is one (it is
#                    added with rustup), else with Debian's rustc and a standard library built from source;
#   AssemblyScript   with assembly/index.ts: with the compiler that its package.json names, else with one of ours;
#   C                with *.c: freestanding, with clang and wasm-ld;
# or it has such directories in it.
#   build.sh --one DIR                  that project, not what is below it: `outrigger filter build`
#   build.sh --c FILE OUT               one file, for the conformance suite
#   build.sh --assemblyscript FILE OUT  the same
set -eu
target=wasm32-wasip1
assemblyscript=0.28.20
cache="${XDG_CACHE_HOME:-$HOME/.cache}/outrigger"
out="${OUTRIGGER_FILTERS_DIR:-$cache/filters}"
quiet="${OUTRIGGER_BUILD_QUIET---quiet}"
# What is not finished has this process' name: others may be building the same.
trap 'rm -f "$out"/.*."$$".*' EXIT

say() { echo "==> $*"; }
fail() {
    for line in "$@"; do echo "error: $line" >&2; done
    exit 1
}

# need TOOL PACKAGE: says what to install.
need() {
    command -v "$1" >/dev/null 2>&1 || fail "$1 is missing; on Debian and Ubuntu: apt-get install -y --no-install-recommends $2"
}

# finish FROM NAME: a rename, so that a proxy that watches the file never sees half of it.
finish() {
    cp "$1" "$out/.$2.$$.new"
    mv "$out/.$2.$$.new" "$out/$2"
    say "built $out/$2 ($(wc -c <"$out/$2" | awk '{ printf "%.1f KiB", $1 / 1024 }'))"
}

has_target() {
    [ -d "$(rustc --print sysroot 2>/dev/null)/lib/rustlib/$target/lib" ]
}

# Sets how `cargo` is called, once.
rust() {
    [ -z "${rust_ready-}" ] || return 0
    command -v cargo >/dev/null 2>&1 || fail "cargo is missing; install Rust from https://rustup.rs"
    if ! has_target && command -v rustup >/dev/null 2>&1; then
        say "adding the target $target with rustup"
        rustup target add "$target" >"$out/rustup.log" 2>&1 || cat "$out/rustup.log" >&2
        rm -f "$out/rustup.log"
    fi
    rust_ready=own
    if ! has_target; then
        for tool in /usr/bin/rustc /usr/bin/wasm-ld-19; do
            [ -x "$tool" ] || fail "Rust's target $target is missing, and rustup could not add it. Either: rustup target add $target" \
                "or, on Debian with its own rustc: apt-get install -y --no-install-recommends libstd-rust-dev-wasm32" \
                "or, on Debian with another one: apt-get install -y --no-install-recommends rustc-web rust-web-src lld-19 wasi-libc"
        done
        say "rustup has no target $target here: building with Debian's rustc, and the standard library from source"
        rust_ready=debian
    fi
}

cargo_build() {
    locked=
    # A new project has no lock file yet.
    [ -f Cargo.lock ] && locked=--locked
    if [ "$rust_ready" = own ]; then
        CARGO_TARGET_DIR="$cargo" cargo build $quiet $locked --release --target "$target"
        return
    fi
    RUSTC=/usr/bin/rustc RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR="$cargo" \
        CARGO_TARGET_WASM32_WASIP1_LINKER=wasm-ld-19 \
        CARGO_TARGET_WASM32_WASIP1_RUSTFLAGS="-L/usr/lib/wasm32-wasi -Clink-self-contained=no" \
        cargo build $quiet $locked --release --target "$target" -Zbuild-std=std,panic_abort
}

build_rust() {
    say "building $1 (Rust, $target)"
    rust
    cargo="${OUTRIGGER_CARGO_DIR:-$out/cargo}"
    (cd "$1" && cargo_build)
    for manifest in "$1"/Cargo.toml "$1"/*/Cargo.toml; do
        [ -f "$manifest" ] && grep -q cdylib "$manifest" || continue
        file=$(sed -n 's/^name = "\(.*\)"/\1/p' "$manifest" | head -n 1 | tr - _).wasm
        finish "$cargo/$target/release/$file" "$file"
    done
}

# Where the compiler of AssemblyScript is, for sources without a package.json: ours, installed once for all.
asc() {
    need node nodejs
    need npm npm
    at="$cache/npm/node_modules/assemblyscript"
    if ! grep -q "\"version\": \"$assemblyscript\"" "$at/package.json" 2>/dev/null; then
        say "installing AssemblyScript $assemblyscript with npm" >&2
        mkdir -p "$cache/npm"
        # Others may be building too.
        flock "$cache/npm" npm install --silent --no-audit --no-fund --prefer-offline --prefix "$cache/npm" "assemblyscript@$assemblyscript" >&2 ||
            fail "npm could not install assemblyscript@$assemblyscript: is its registry reachable?"
    fi
    echo "$at/bin/asc.js"
}

build_assemblyscript() {
    say "building $1 (AssemblyScript)"
    if [ -f "$1/package.json" ]; then
        need node nodejs
        need npm npm
        compiler=node_modules/assemblyscript/bin/asc.js
        if [ ! -f "$1/$compiler" ] || [ "$1/package.json" -nt "$1/node_modules" ]; then
            say "installing what package.json names with npm"
            (cd "$1" && npm install --silent --no-audit --no-fund --prefer-offline && touch node_modules) ||
                fail "npm install failed in $1: is its registry reachable?"
            [ -f "$1/$compiler" ] || fail "$1/package.json does not name assemblyscript among its devDependencies"
        fi
    else
        compiler=$(asc)
    fi
    (cd "$1" && node "$compiler" assembly/index.ts --config asconfig.json --outFile "$out/.$2.$$.tmp")
    finish "$out/.$2.$$.tmp" "$2"
}

compile_c() {
    need clang clang
    need wasm-ld lld
    to=$1
    shift
    clang --target=wasm32 -ffreestanding -nostdlib -O2 -Wall -Wextra -Werror -Wno-unused-parameter \
        -Wl,--no-entry -Wl,--strip-debug -o "$to" "$@"
}

build_c() {
    say "building $1 (C)"
    compile_c "$out/.$2.$$.tmp" "$1"/*.c
    finish "$out/.$2.$$.tmp" "$2"
}

# What is in a directory: rust, assemblyscript, c, or nothing.
kind() {
    if [ -f "$1/Cargo.toml" ]; then
        echo rust
    elif [ -f "$1/assembly/index.ts" ]; then
        echo assemblyscript
    elif ls "$1"/*.c >/dev/null 2>&1; then
        echo c
    fi
}

# build KIND DIR
build() {
    "build_$1" "$2" "$(basename "$(cd "$2" && pwd)" | tr - _).wasm"
    built=yes
}

one=
case "${1-}" in
--c)
    compile_c "$3" "$2"
    exit
    ;;
--assemblyscript)
    compiler=$(asc)
    exec node "$compiler" "$2" --optimize --runtime stub --use abort= --outFile "$3"
    ;;
--one)
    one=yes
    shift
    ;;
esac

mkdir -p "$out"
out=$(cd "$out" && pwd)
[ $# -gt 0 ] || set -- "$(dirname "$0")"
for directory in "$@"; do
    [ -d "$directory" ] || fail "$directory is not a directory"
    built=
    is=$(kind "$directory")
    if [ -n "$is" ]; then build "$is" "$directory"; fi
    for below in "$directory"/*/; do
        [ -z "$one" ] || break
        is=$(kind "${below%/}")
        # Crates of a workspace have been built with it.
        if [ -z "$is" ] || { [ "$is" = rust ] && [ -f "$directory/Cargo.toml" ]; }; then continue; fi
        build "$is" "${below%/}"
    done
    [ -n "$built" ] || fail "$directory: there is no filter here: no Cargo.toml, no assembly/index.ts, no *.c"
done
