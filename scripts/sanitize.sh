#!/usr/bin/env bash
# The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: builds them apart, with every
# finding fatal, and runs tests/kernels on that build. The library in the source tree is untouched.
# With --emulate-avx512 as the first argument, those for AVX-512 as in emulate_avx512.sh. Needs GCC.
# Takes about a minute on two cores, half of it compiling. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$PWD/.venv/bin/python}
build=$PWD/build/sanitize
emulate=
if [ "${1:-}" = --emulate-avx512 ]; then
  emulate=$1
  build+=-emulated
  shift
fi
scripts/kernel_tree.sh "$build" $emulate
(cd "$build" && CXX="${CXX:-g++}${emulate:+ -Wno-psabi}" HALFBYTE_SANITIZE=1 \
  "$python" setup.py -q build_ext --inplace)
nm -D "$build/src/halfbyte/kernels/_native.so" | grep -c __asan_ > /dev/null || { echo "not sanitized"; exit 1; }
# The C++ runtime as well: exceptions are intercepted only if it is there from the start.
runtime="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libstdc++.so)"
# Python and PyTorch keep memory until the end on purpose, so leaks are not looked for. The
# interpreter is not instrumented, hence the library is loaded first.
export LD_PRELOAD=$runtime
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:abort_on_error=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export HALFBYTE_BACKEND=native
export PYTHONPATH=$build/src
"$python" -c "import halfbyte.kernels.backends as b; assert str(b.NATIVE.library).startswith('$build'), b.NATIVE"
exec "$python" -m pytest -q -p no:cacheprovider -o pythonpath="$build/src tests" \
  tests/kernels -m 'not slow' "$@"
