#!/usr/bin/env bash
# Runs the quick tests on the lowest versions that pyproject.toml declares and on the newest that pip finds.
#
#   tests/versions.sh [lowest|newest] [PYTEST ARGUMENTS]      both, without the first word; PYTHON names the interpreter
#
# Each set has a virtual environment of its own in a temporary folder, and a copy of the tree, both removed at the end.
# "Newest" keeps the torch that requirements-dev.txt pins. "Lowest" takes torch's lowest release without CUDA where pip
# finds one, else the release as it is, which brings CUDA's libraries (several GB).
set -euo pipefail

case "${1:-}" in lowest | newest) sets=("$1") && shift ;; *) sets=(lowest newest) ;; esac
python=$(command -v "${PYTHON:-python3.11}")
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
core=(torch transformers safetensors numpy tqdm)
others=("setuptools>=77" pybind11 pytest hypothesis accelerate peft matplotlib typer rich)
# What reads, calls or writes through another package; eight minutes on two cores.
quick=(calibration/{sets,batches} checkpoint/{patch,shards,streaming} masking/apply organism/checkpoints
  evaluation/{cache,generate,metrics,perplexity,refused,suite} reporting/{page,report} scoring/{engine,scores}
  model/{adapters,experts,hybrids,modes,moe,positions,recomputed_weights,self_check,supported}
  ops/{accumulate,memory,sparse,top_scores,triton,validate,wanda_root})

# The declared minimum of a package.
lowest() { sed -n "s/^ *\"$1>=\([0-9.]*\)\",\$/\1/p" "$root/pyproject.toml"; }

# The first of some requirements that pip can install.
first_found() {
  local requirement
  for requirement in "$@"; do
    "$venv/bin/pip" install --quiet --dry-run --no-deps "$requirement" >/dev/null 2>&1 && echo "$requirement" && return
  done
  echo "versions.sh: pip finds none of $*" >&2
  return 1
}

files=()
for name in "${quick[@]}"; do files+=("tests/${name%/*}/test_${name#*/}.py"); done
failed=()
for set in "${sets[@]}"; do
  venv="$folder/$set"
  "$python" -m venv "$venv"
  requirements=()
  if [ "$set" = lowest ]; then
    for package in "${core[@]}"; do
      version=$(lowest "$package")
      if [ "$package" = torch ]; then
        requirements+=("$(first_found "torch==$version.0+cpu" "torch==$version+cpu" "torch==$version")")
      else
        # Not every minor release has a patch 0: the lowest of it is meant.
        requirements+=("$(first_found "$package==$version" "$package==$version.1" "$package==$version.2")")
      fi
    done
  else
    torch=$(sed -n 's/^torch==//p' "$root/requirements-dev.txt")
    # The lowest tqdm rules out every release of datasets that is declared, so its tests are left out there.
    requirements=("$(first_found "torch==$torch+cpu" "torch==$torch")" transformers safetensors numpy tqdm datasets)
    grep -q '^triton==' "$root/requirements-dev.txt" && requirements+=("$(sed -n 's/^\(triton==[0-9.]*\).*/\1/p' "$root/requirements-dev.txt")")
  fi
  # Wheels alone: for an old NumPy, pip would build old releases of what needs it from source.
  "$venv/bin/pip" install --quiet --no-input --only-binary :all: "${requirements[@]}" "${others[@]}"

  copy="$folder/tree-$set"
  mkdir "$copy"
  cp -r "$root"/{fastprune,kernels,csrc,tests,docs,benchmarks,examples,setup.py,pyproject.toml,requirements-dev.txt,README.md,LICENSE} "$copy"
  rm -f "$copy"/fastprune/*.so
  (cd "$copy" && FASTPRUNE_REQUIRE_EXT=1 FASTPRUNE_CUDA=0 "$venv/bin/pip" install --quiet --no-deps --no-build-isolation -e .)

  tested=$("$venv/bin/pip" list --format=freeze | grep -iE "^($(IFS='|'; echo "${core[*]}"))==" | paste -sd ' ')
  echo "versions.sh: $set: $("$venv/bin/python" --version), $tested"
  if (cd "$copy" && "$venv/bin/python" -m pytest -q -m "not slow and not gpu" -p no:cacheprovider \
    "${files[@]}" "$@"); then
    echo "versions.sh: $set: passed on $tested"
  else
    failed+=("$set on $tested")
  fi
  rm -rf "$venv" "$copy"
done
if [ ${#failed[@]} -gt 0 ]; then
  printf 'versions.sh: FAILED: %s\n' "${failed[@]}" >&2
  exit 1
fi
