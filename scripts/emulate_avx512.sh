#!/usr/bin/env bash
# The AVX-512 kernels on a processor without AVX-512: builds them apart, with each of its
# instructions made of AVX2 ones (emulated_avx512.h), and runs tests/kernels on that build with these
# kernels as the best. Shows that they compute what they should, and nothing about how fast.
# Needs GCC. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$PWD/.venv/bin/python}
build=$PWD/build/emulated
mkdir -p "$build"
tar --exclude='*.so' -cf - src setup.py pyproject.toml README.md LICENSE | tar -xf - -C "$build"
native=$build/src/halfbyte/kernels/native
cp -p scripts/emulated_avx512.h "$native"
for source in "$native"/avx512*.cpp; do
  sed -i 's/"avx512f[^"]*avx2,/"avx2,/; s/#include "target.h"/&\n#include "emulated_avx512.h"/' "$source"
  touch -r "src/halfbyte/kernels/native/$(basename "$source")" "$source"
done
sed -i 's/__builtin_cpu_supports("avx512[a-z0-9]*")/true/g' "$native/dispatch.cpp"
touch -r src/halfbyte/kernels/native/dispatch.cpp "$native/dispatch.cpp"
# Registers of 64 bytes are passed in memory here, which the compiler would warn of.
(cd "$build" && CXX="${CXX:-g++} -Wno-psabi" "$python" setup.py -q build_ext --inplace)
if objdump -d "$build/src/halfbyte/kernels/_native.so" | grep -q zmm; then
  echo "not emulated: there are AVX-512 instructions in the library" >&2
  exit 1
fi
export HALFBYTE_BACKEND=native PYTHONPATH=$build/src
HALFBYTE_CPU_ISA=avx512bf16 "$python" -c \
  "import halfbyte.kernels.backends as b; assert str(b.NATIVE.library).startswith('$build'), b.NATIVE"
exec "$python" -m pytest -q -p no:cacheprovider -o pythonpath="$build/src tests" \
  tests/kernels -m 'not slow' "$@"
