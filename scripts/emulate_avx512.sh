#!/usr/bin/env bash
# The AVX-512 kernels on a processor without AVX-512: builds them apart, with each of its
# instructions made of AVX2 ones, and runs tests/kernels on that build. Shows that they compute what
# they should, and nothing about how fast. Needs GCC. Takes two minutes on two cores, most of it
# compiling. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$PWD/.venv/bin/python}
build=$PWD/build/emulated
scripts/kernel_tree.sh "$build" --emulate-avx512
# Registers of 64 bytes are passed in memory here, which the compiler would warn of.
(cd "$build" && CXX="${CXX:-g++} -Wno-psabi" "$python" setup.py -q build_ext --inplace)
if objdump -d "$build/src/halfbyte/kernels/_native.so" | grep -c zmm > /dev/null; then
  echo "not emulated: there are AVX-512 instructions in the library" >&2
  exit 1
fi
export HALFBYTE_BACKEND=native PYTHONPATH=$build/src
HALFBYTE_CPU_ISA=avx512bf16 "$python" -c \
  "import halfbyte.kernels.backends as b; assert str(b.NATIVE.library).startswith('$build'), b.NATIVE"
exec "$python" -m pytest -q -p no:cacheprovider -o pythonpath="$build/src tests" \
  tests/kernels -m 'not slow' "$@"
