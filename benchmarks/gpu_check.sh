#!/usr/bin/env bash
# Everything that needs a GPU, in one call of nine minutes at most, without a network.
#
#   benchmarks/gpu_check.sh [--dry-run] OUTDIR
#
# Builds the extensions, runs the benchmarks and the tests that need a device, and looks for memory errors and races in
# the CUDA operations; what matters most goes first. OUTDIR gets steps.jsonl (a line for each step: status, exit code,
# seconds), log.txt (all output) and results.jsonl (a line for each measurement, also those of a step that was stopped).
# A step that fails is recorded and the next ones go on; the exit code is then 1. --dry-run goes through the same steps
# without a device: extensions are compiled but not installed, the emulated kernels stand for the device's, benchmarks
# run on tiny tensors and time nothing.
# PYTHON names the interpreter (python3); it needs torch, pytest, pytest-benchmark, setuptools and pybind11. With
# pytest-xdist the tests are shared by eight processes, with pytest-timeout none of them takes more than a minute.
set -uo pipefail

usage() {
  sed -n '4p' "$0" | cut -c5- >&2
  exit 2
}

refuse() {
  echo "gpu_check.sh: $1" >&2
  exit 2
}

dry_run=false
outdir=
while (($#)); do
  case $1 in
    --dry-run) dry_run=true ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" && exit 0 ;;
    -*) refuse "unknown option '$1'; there is --dry-run" ;;
    *) [[ -z $outdir ]] || refuse "expected one OUTDIR, got '$outdir' and '$1'"; outdir=$1 ;;
  esac
  shift
done
[[ -n $outdir ]] || usage

python=${PYTHON:-python3}
command -v "$python" >/dev/null || refuse "there is no '$python'; set PYTHON"
mkdir -p "$outdir" || refuse "OUTDIR: '$outdir' cannot be made"
outdir=$(cd "$outdir" && pwd)
[[ ! -e $outdir/steps.jsonl ]] || refuse "OUTDIR: '$outdir' has the results of an earlier run"
python=$(command -v "$python")
[[ $python == /* ]] || python=$PWD/$python
cd "$(dirname "$0")/.." || exit 2
on_device=$("$python" -c 'import torch, pytest, pytest_benchmark, setuptools, pybind11
print(torch.cuda.is_available())') || refuse "'$python' lacks a package that the steps need"
$dry_run || [[ $on_device == True ]] || refuse "torch sees no CUDA device; --dry-run goes through the steps without one"

# The nine minutes in seconds, and those of them in which a step that outlasts them is killed and recorded. A rehearsal
# has no such limit, and a small machine may take it.
if $dry_run; then readonly BUDGET=3600 PATIENCE=5; else readonly BUDGET=540 PATIENCE=1; fi
readonly GRACE=8
readonly log=$outdir/log.txt results=$outdir/results.jsonl
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export TMPDIR=$scratch # a benchmark that is stopped leaves its checkpoint
failures=0
unset TRITON_INTERPRET # interpreted kernels serve no device
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# The kernels under the name that an installation gives them: without one, everything would run in plain torch.
ln -s "$PWD/kernels" "$scratch/fastprune_kernels"
export PYTHONPATH=$PWD:$scratch${PYTHONPATH:+:$PYTHONPATH}

# record NAME STATUS EXIT_CODE SECONDS NOTE
record() {
  "$python" -c '
import json, sys
name, status, code, seconds, note = sys.argv[1:]
line = {"step": name, "status": status, "exit_code": int(code) if code else None, "seconds": float(seconds), "note": note}
print(json.dumps(line))' "$@" | tee -a "$outdir/steps.jsonl"
}

skip() {
  record "$1" skipped "" 0 "$2"
}

# step NAME LIMIT COMMAND...: runs the command for at most LIMIT seconds, and no longer than the budget lasts. Fails
# unless that succeeded.
step() {
  local name=$1 limit=$(($2 * PATIENCE)) left=$((BUDGET - GRACE - SECONDS)) code=0 start status=ok note=
  shift 2
  ((limit <= left)) || limit=$left
  if ((limit < 5)); then
    skip "$name" "no time left of $BUDGET s"
    failures=$((failures + 1))
    return 1
  fi
  printf '\n===== %s: %s\n' "$name" "$*" >>"$log"
  start=$(date +%s.%N)
  timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1 </dev/null || code=$?
  if ((code == 124 || code == 137)); then
    status=timeout note="stopped after $limit s"
  elif ((code)); then
    status=failed note=$(tail -n 1 "$log" | cut -c1-200)
  fi
  [[ $status == ok ]] || failures=$((failures + 1))
  record "$name" "$status" "$code" "$(date +%s.%N | awk -v start="$start" '{printf "%.1f", $1 - start}')" "$note"
  [[ $status == ok ]]
}

# benchmark NAME LIMIT ARGUMENT...: the script with these arguments, or its rehearsal.
benchmark() {
  local name=$1 limit=$2
  shift 2
  ! $dry_run || set -- --dry-run
  step "$name" "$limit" "$python" "benchmarks/$name.py" "$@" --out "$results"
}

# Test files with the mark, or with an import from tests/support that gives it to their tests.
files_for_a_device() {
  local file
  for file in $(grep -rl --include='*.py' 'mark\.gpu' tests); do
    if [[ $file == tests/support/* ]]; then
      grep -rlE --include='test_*.py' "^(from|import) support\b.*\b$(basename "$file" .py)\b" tests
    else
      echo "$file"
    fi
  done | sort -u
}

has() {
  "$python" -c "import importlib.util as util; raise SystemExit(util.find_spec('$1') is None)"
}

# What the sanitizer slows down has to be small; torch's caching allocator would hide accesses beyond a tensor's end,
# and torch itself provokes errors of the API, which it handles.
# Exit code 9 is the sanitizer's, for whatever it reported, and 1 is that of a test. The report in the log names the
# kernel: racecheck may object to one inside CUB (its sort and selection), which synchronises within a warp in ways that
# racecheck does not always see; in one of ours a report is a defect.
sanitize() {
  local tool=$1 limit=$2
  local small=("$python" -m pytest -q -x -p no:cacheprovider tests/ops/test_cuda_ops_gpu.py -k "test_small")
  if $dry_run; then
    step "$tool (collection only)" "$limit" "${small[@]}" --collect-only
  elif ! command -v compute-sanitizer >/dev/null; then
    skip "$tool" "there is no compute-sanitizer on this machine"
  else
    step "$tool" "$limit" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      --report-api-errors no --target-processes application-only "${small[@]}"
  fi
}

environment() {
  "$python" - <<'PYTHON' || return
import platform, sys
import torch, transformers, triton
print("python", sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__,
      "transformers", transformers.__version__, "machine", platform.machine())
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0))
PYTHON
  command -v nvcc && nvcc --version | tail -n 2
  command -v nvidia-smi && nvidia-smi
  return 0
}
export -f environment
export python

step environment 60 bash -c environment

# Says what can serve the operations, and fails unless the backends that it is given can: the benchmarks would run in
# plain torch without them.
backends=("$python" -c 'import sys
from fastprune import ops
status = ops.available_backends()
print(status)
sys.exit("; ".join(f"{name}: {status[name]}" for name in sys.argv[1:] if status[name] != "available") or None)')

export FASTPRUNE_REQUIRE_EXT=1 # an extension that does not build is a failure here, not a smaller install
if $dry_run; then
  build=("$python" -m pip wheel --no-build-isolation --no-deps --wheel-dir "$scratch" .)
  built=(bash -c 'for name in _cpp _cuda; do unzip -l "$0"/*.whl | grep "fastprune/$name" || exit 1; done; "$@"' \
    "$scratch" "${backends[@]}")
else
  build=("$python" -m pip install --no-build-isolation --no-deps -e .)
  built=("${backends[@]}" cpp triton cuda)
fi
step build 120 "${build[@]}" ||
  step "build without the CUDA extension" 60 env FASTPRUNE_REQUIRE_EXT=0 FASTPRUNE_CUDA=0 "${build[@]}"
step "built extensions" 40 "${built[@]}"

benchmark bench_scoring 180 --device cuda

tests=("$python" -m pytest -m gpu -q -p no:cacheprovider --durations=15)
has xdist && tests=(env OMP_NUM_THREADS=2 "${tests[@]}" -n 8)
has pytest_timeout && tests+=(--timeout 60)
mapfile -t files < <(files_for_a_device)
step "tests on a device" 120 "${tests[@]}" "${files[@]}"
! $dry_run || step "tests of emulated kernels" 40 "$python" -m pytest -q -p no:cacheprovider tests/ops/test_cuda_emulated.py

benchmark bench_cuda_ops 40
benchmark bench_ops 90 --device cuda --passes 1
sanitize memcheck 90
benchmark bench_streaming 110 --device cuda --examples 206 # half of the scoring benchmark's, for the time
sanitize racecheck 60

echo "gpu_check.sh: $failures of $(wc -l <"$outdir/steps.jsonl") steps failed or had no time; see $outdir" >&2
exit $((failures > 0))
