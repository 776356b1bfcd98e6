#!/bin/sh
# Builds the filters of this directory, or of the workspaces named (`build.sh bench/wasm`), for wasm32-wasip1, into
# ~/.cache/outrigger/filters/*.wasm (a file there can be the `module.file` of a WasmFilter). Uses the toolchain's own target if there is
# one (rustup), else Debian's rustc with a standard library built from source. OUTRIGGER_FILTERS_DIR names another directory.
set -eu
[ $# -gt 0 ] || set -- "$(dirname "$0")"
target=wasm32-wasip1
out="${OUTRIGGER_FILTERS_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/outrigger/filters}"
mkdir -p "$out"

has_target() {
    [ -d "$(rustc --print sysroot 2>/dev/null)/lib/rustlib/$target/lib" ]
}

if ! has_target && command -v rustup >/dev/null 2>&1; then
    echo "filters: adding the target $target"
    rustup target add "$target" >/dev/null 2>&1 || true
fi

build() {
    if has_target; then
        CARGO_TARGET_DIR="$out/cargo" cargo build --quiet --locked --release --target "$target"
        return
    fi
    for tool in /usr/bin/rustc /usr/bin/wasm-ld-19; do
        if [ ! -x "$tool" ]; then
            echo "filters: $target is missing. Either: rustup target add $target" >&2
            echo "filters: or, on Debian: apt-get install -y --no-install-recommends rustc-web rust-web-src lld-19 wasi-libc" >&2
            exit 1
        fi
    done
    RUSTC=/usr/bin/rustc RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR="$out/cargo" \
        CARGO_TARGET_WASM32_WASIP1_LINKER=wasm-ld-19 \
        CARGO_TARGET_WASM32_WASIP1_RUSTFLAGS="-L/usr/lib/wasm32-wasi -Clink-self-contained=no" \
        cargo build --quiet --locked --release --target "$target" -Zbuild-std=std,panic_abort
}

for workspace in "$@"; do
    echo "filters: building $workspace"
    (cd "$workspace" && build)
    for manifest in "$workspace"/Cargo.toml "$workspace"/*/Cargo.toml; do
        [ -f "$manifest" ] && grep -q cdylib "$manifest" || continue
        file=$(sed -n 's/^name = "\(.*\)"/\1/p' "$manifest" | head -n 1 | tr - _).wasm
        # A rename, so that a proxy that watches the file never sees half of it.
        cp "$out/cargo/$target/release/$file" "$out/$file.new"
        mv "$out/$file.new" "$out/$file"
    done
done
