#!/usr/bin/env bash
# Compiles every native source for aarch64, warnings as errors, and compares what the portable
# kernels compute there, under emulation, with this machine, bit for bit. A minute on one core.
# On Debian: apt install g++-aarch64-linux-gnu qemu-user-static
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$PWD/.venv/bin/python}
native=src/halfbyte/kernels/native
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
headers=$("$python" -c "import torch.utils.cpp_extension as c; print(*('-isystem' + p for p in c.include_paths()))")
# As setup.py has them.
flags="-std=c++20 -O3 -Wall -Wextra -Werror -Wno-unused-function -fvisibility=hidden -ffp-contract=off
  -fno-trapping-math -fno-math-errno -DTORCH_TARGET_VERSION=0x020b000000000000"
for source in "$native"/*.cpp; do
  # shellcheck disable=SC2086
  aarch64-linux-gnu-g++ $flags -fPIC $headers -c "$source" -o "$build/$(basename "$source" .cpp).o"
done
bits() {  # with a compiler, into a file
  # shellcheck disable=SC2086
  $1 $flags -static -I"$native" $headers scripts/portable_bits.cpp "$native/portable.cpp" -o "$2"
}
bits "${CXX:-g++}" "$build/here"
bits aarch64-linux-gnu-g++ "$build/there"
"$build/here" > "$build/here.txt"
qemu-aarch64-static "$build/there" > "$build/there.txt"
diff "$build/here.txt" "$build/there.txt"
cat "$build/there.txt"
echo "every source compiles for aarch64, and all of these are equal there"
