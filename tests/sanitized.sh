#!/usr/bin/env bash
# Runs the tests of the C++ operations on a build with AddressSanitizer and UndefinedBehaviorSanitizer, in a copy.
#
#   tests/sanitized.sh [PYTHON]
set -euo pipefail

python=$(realpath -s "${1:-python3}")
root=$(cd "$(dirname "$0")/.." && pwd)
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r "$root"/{fastprune,kernels,csrc,setup.py,pyproject.toml,README.md,LICENSE} "$copy"
rm -f "$copy"/fastprune/*.so
cd "$copy"

flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -g"
CC="gcc $flags" CXX="g++ $flags" LDFLAGS="$flags" FASTPRUNE_REQUIRE_EXT=1 FASTPRUNE_CUDA=0 "$python" setup.py -q build_ext --inplace

# The interpreter is not built with the sanitizer, so that its library has to be there first; what Python and torch
# allocate for good would be reported as leaks.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0
"$python" - <<'PYTHON'
import fastprune._cpp

assert "__asan_init" in open(fastprune._cpp.__file__, "rb").read().decode("latin-1"), "built without the sanitizer"
PYTHON
"$python" -m pytest -q -p no:cacheprovider --rootdir="$root/tests" -c "$root/pyproject.toml" \
  "$root"/tests/ops/test_{accumulate,several_sums,sparse,top_scores}.py
