#!/usr/bin/env bash
# Installs what building and testing Outrigger need, on Debian and Ubuntu. Quick when nothing is missing.
#   setup.sh         do it
#   setup.sh --bench also what bench/ compares with, as far as apt has it
#   setup.sh --venv  print where the Python environment of the tests is
#   setup.sh --profdata  print where the llvm-profdata of rustc's LLVM is, installed if it is missing (for scripts/release.sh)
set -euo pipefail
cd "$(dirname "$0")/.."

cache="${XDG_CACHE_HOME:-$HOME/.cache}/outrigger"
venv="$cache/venv"
if [ "${1:-}" = --venv ]; then
    echo "$venv"
    exit
fi

say() { echo "==> $*"; }
fail() {
    echo "setup: $*" >&2
    exit 1
}
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        fail "needs root to run: $* (log in as root, or install sudo)"
    fi
}

updated=
apt_install() {
    command -v apt-get >/dev/null || fail "missing: $*. This is not Debian or Ubuntu: install them by hand, then run it again"
    say "installing with apt: $*"
    if [ -z "$updated" ]; then
        as_root apt-get update -q
        updated=yes
    fi
    # Without a runlevel nothing that is installed is started.
    as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -q --no-install-recommends "$@"
}

# rustup's, or else the distribution's of the same version.
profdata() {
    local host major own
    host=$(rustc -vV | sed -n 's/^host: //p')
    major=$(rustc -vV | sed -n 's/^LLVM version: \([0-9]*\).*/\1/p')
    own="$(rustc --print sysroot)/lib/rustlib/$host/bin/llvm-profdata"
    if ! [ -x "$own" ] && ! command -v "llvm-profdata-$major" >/dev/null; then
        say "adding llvm-tools with rustup"
        if ! command -v rustup >/dev/null || ! rustup component add llvm-tools; then apt_install "llvm-$major"; fi
    fi
    if [ -x "$own" ]; then echo "$own" >&3; else command -v "llvm-profdata-$major" >&3; fi
}
if [ "${1:-}" = --profdata ]; then
    # Only the answer on its output.
    profdata 3>&1 >&2
    exit
fi

# What a package is needed for, as "command:package".
tools=(cc:build-essential curl:curl ip:iproute2 nft:nftables setpriv:util-linux openssl:openssl
    h2load:nghttp2-client wrk:wrk python3:python3 valgrind:valgrind
    docker-registry:docker-registry htpasswd:apache2-utils
    clang:clang wasm-ld:lld node:nodejs npm:npm) # these four: filters in C and AssemblyScript
if [ "${1:-}" = --bench ]; then tools+=(nginx:nginx haproxy:haproxy); fi
packages=()
PATH="$PATH:/usr/sbin:/sbin"
for tool in "${tools[@]}"; do
    command -v "${tool%%:*}" >/dev/null || packages+=("${tool##*:}")
done
if [ "${1:-}" = --bench ] && ! [ -e /usr/lib/nginx/modules/ngx_stream_module.so ]; then packages+=(libnginx-mod-stream); fi
[ -e /etc/ssl/certs/ca-certificates.crt ] || packages+=(ca-certificates)
# ensurepip is what Debian splits off into python3-venv.
if command -v python3 >/dev/null && ! python3 -c 'import ensurepip, venv' 2>/dev/null; then packages+=(python3-venv); fi
command -v python3 >/dev/null || packages+=(python3-venv)
[ ${#packages[@]} = 0 ] || apt_install "${packages[@]}"

# Rust: at least the version that Cargo.toml names.
wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
how="install Rust $wanted or newer from https://rustup.rs (curl -sSf https://sh.rustup.rs | sh), then run it again"
if ! command -v cargo >/dev/null; then
    say "Rust is missing"
    apt-cache show rustup >/dev/null 2>&1 || as_root apt-get update -q || true
    apt-cache show rustup >/dev/null 2>&1 || fail "this distribution has no rustup package: $how"
    apt_install rustup
    say "installing the stable Rust toolchain with rustup"
    rustup default stable
fi
rust=$(rustc --version | awk '{ print $2 }')
if [ "$(printf '%s\n%s\n' "$wanted" "$rust" | sort -V | head -n 1)" != "$wanted" ]; then
    command -v rustup >/dev/null || fail "Rust $rust is too old: $how"
    say "Rust $rust is older than $wanted: updating the stable toolchain with rustup"
    rustup update stable
    rust=$(rustc --version | awk '{ print $2 }')
    [ "$(printf '%s\n%s\n' "$wanted" "$rust" | sort -V | head -n 1)" = "$wanted" ] ||
        fail "Rust $rust is still what runs here: choose the new one with 'rustup default stable'"
fi
for component in rustfmt clippy-driver; do
    if ! command -v "$component" >/dev/null || ! "$component" --version >/dev/null 2>&1; then
        command -v rustup >/dev/null || fail "$component is missing: $how"
        say "adding ${component%-driver} with rustup"
        rustup component add "${component%-driver}"
    fi
done

# Filters are built for wasm32-wasip1.
if ! [ -d "$(rustc --print target-libdir --target wasm32-wasip1)" ]; then
    if command -v rustup >/dev/null; then
        say "adding the target wasm32-wasip1 with rustup"
        rustup target add wasm32-wasip1
    else
        # A distribution's Rust has its standard library for WASM in a package of its own.
        apt_install libstd-rust-dev-wasm32
    fi
fi

# Clients that tests use and nobody here wrote: grpcio with Envoy's message classes, websockets.
requirements=tests/python/requirements.txt
if ! cmp -s "$requirements" "$venv/requirements.txt"; then
    say "installing the Python clients of the tests into $venv"
    [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --requirement "$requirements"
    cp "$requirements" "$venv/requirements.txt"
fi
