#!/usr/bin/env bash
# The NEON kernels of the compiled CPU operators against the generic ones, cross-compiled for 64-bit ARM
# and run under qemu. Needs qemu-aarch64, and ziglang (a C++ cross-compiler) in the environment of PYTHON.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
native=src/selfindex/backends/cpu/native
"${PYTHON:-python3}" -m ziglang c++ -target aarch64-linux-musl -static -std=c++17 -O2 -Wall -Wextra -Wno-psabi \
  -DSELFINDEX_NEON -I $native $native/{kernels_neon,kernels_generic,dispatch}.cpp tests/cpu/native/compare.cpp \
  -o "$work/compare"
qemu-aarch64 "$work/compare" neon
