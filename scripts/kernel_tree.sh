#!/usr/bin/env bash
# Copies what the kernels are built from to DIR, without a library and with the times of files, so
# that building there again compiles only what changed. With --emulate-avx512 each AVX-512 instruction
# is made of AVX2 ones (emulated_avx512.h), and the dispatch takes them for present.
#
#   scripts/kernel_tree.sh DIR [--emulate-avx512]
set -euo pipefail
cd "$(dirname "$0")/.."
tree=$1
native=$tree/src/halfbyte/kernels/native
mkdir -p "$tree"
rm -rf "$native"
tar --exclude='*.so' -cf - src setup.py pyproject.toml README.md LICENSE | tar -xf - -C "$tree"
[ "${2:-}" = --emulate-avx512 ] || exit 0
cp -p scripts/emulated_avx512.h "$native"
sed -i 's/"avx512f[^"]*avx2,/"avx2,/; s/#include "target.h"/&\n#include "emulated_avx512.h"/' \
  "$native"/avx512*.cpp
sed -i 's/__builtin_cpu_supports("avx512[a-z0-9]*")/true/g' "$native/dispatch.cpp"
for source in "$native"/avx512*.cpp "$native/dispatch.cpp"; do
  touch -r "src/halfbyte/kernels/native/$(basename "$source")" "$source"
done
