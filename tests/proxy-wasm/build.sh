#!/usr/bin/env bash
# Compiles the guests of the conformance suite that are not WAT into ~/.cache/outrigger/conformance/*.wasm: one in Rust, one in C, one in
# AssemblyScript, the latter two as filters/build.sh does it. Does nothing where the result is newer than its source.
set -euo pipefail
cd "$(dirname "$0")/guests"
out="${XDG_CACHE_HOME:-$HOME/.cache}/outrigger/conformance"
build=$(cd ../../../filters && pwd)/build.sh
mkdir -p "$out"
# Tests run side by side.
exec 9>"$out/.lock"
flock 9

finish() { mv "$out/$1.new" "$out/$1"; }

if ! [ -e "$out/rust.wasm" ] || [ rust.rs -nt "$out/rust.wasm" ]; then
    rustc --edition 2024 --target wasm32-wasip1 --crate-type cdylib -C opt-level=s -C strip=debuginfo -C panic=abort \
        -o "$out/rust.wasm.new" rust.rs
    finish rust.wasm
fi
if ! [ -e "$out/c.wasm" ] || [ c.c -nt "$out/c.wasm" ]; then
    "$build" --c c.c "$out/c.wasm.new"
    finish c.wasm
fi
if ! [ -e "$out/assemblyscript.wasm" ] || [ assemblyscript.ts -nt "$out/assemblyscript.wasm" ]; then
    "$build" --assemblyscript assemblyscript.ts "$out/assemblyscript.wasm.new"
    finish assemblyscript.wasm
fi
