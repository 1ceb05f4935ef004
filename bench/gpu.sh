#!/usr/bin/env bash
# Runs everything that needs a GPU, in parts of under nine minutes that can be run one by one.
#
#   bench/gpu.sh [--rehearse] [--wheels FOLDER] [--python PYTHON] [PART…]
#
# PART        tests       the tests marked gpu
#             sanitizer   a few of these tests under compute-sanitizer, with memcheck and racecheck
#             bench       pytest bench/
#             train-1 train-2 train-3     bench/train_24gb.py, one stage each
#             Without a PART all of them run. If one fails, the next one runs all the same.
# --wheels    a folder of wheels that are put on PYTHONPATH for this run; nothing is installed or fetched. The parts
#             need PyTorch, transformers, peft, bitsandbytes, pydantic, soundfile, soxr, espeakng-loader, and pytest with
#             pytest-benchmark and hypothesis. nvtx and the benches' peers are optional.
# --python    the interpreter that has PyTorch (default: python3)
# --rehearse  run every part on a CPU at tiny sizes, to test the script; nothing is measured
#
# The files go to $OUT, else to bench/results/<device>/ (those of a rehearsal to runs/gpu-rehearsal/): the log of each
# part, gpu-<part>.json, and the part's own files. The exit status is the number of parts that failed.

set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
parts=(tests sanitizer bench train-1 train-2 train-3)
# A part is interrupted after so many seconds, early enough to write its files within nine minutes.
limit=510
python=python3 wheels="" rehearse="" wanted=()

fail() {
  echo "gpu.sh: $*" >&2
  exit 64
}

while (($#)); do
  case $1 in
    --rehearse) rehearse=yes ;;
    --wheels) wheels=${2:?--wheels takes a folder}; shift ;;
    --python) python=${2:?--python takes an interpreter}; shift ;;
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    -*) fail "unknown option $1; see --help" ;;
    *)
      [[ " ${parts[*]} " == *" $1 "* ]] || fail "unknown part '$1'; the parts are ${parts[*]}"
      wanted+=("$1")
      ;;
  esac
  shift
done
((${#wanted[@]})) || wanted=("${parts[@]}")
[[ -z $wheels || -d $wheels ]] || fail "--wheels $wheels: no such folder"
[[ -z $wheels ]] || wheels=$(cd "$wheels" && pwd)

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# The package without an installation: a folder with links in which `kernels` lies inside `soundwave`.
mkdir -p "$scratch/site/soundwave" "$scratch/wheels"
for entry in "$root"/soundwave/*; do
  [[ $entry == */__pycache__ ]] || ln -s "$entry" "$scratch/site/soundwave/"
done
ln -s "$root/kernels" "$scratch/site/soundwave/kernels"
export PYTHONPATH="$scratch/site:$scratch/wheels${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 # the checkout's folder `kernels` must not be found from its root

for wheel in ${wheels:+"$wheels"/*.whl}; do
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
    --upgrade --target "$scratch/wheels" "$wheel" || echo "gpu.sh: left out $wheel"
done

# Before anything runs: the device's name, for the folder of the results, and a warning of missing packages.
device=$(
  "$python" - "${rehearse:-no}" <<'PYTHON'
import importlib.util
import re
import sys

import torch

if sys.argv[1] == "no" and not torch.cuda.is_available():
    sys.exit("gpu.sh: no CUDA GPU was found; --rehearse runs without one")
needed = "triton transformers peft accelerate pytest pytest_benchmark hypothesis bitsandbytes pydantic soundfile soxr"
missing = [name for name in [*needed.split(), "espeakng_loader"] if importlib.util.find_spec(name) is None]
if missing:
    print(f"gpu.sh: not installed: {', '.join(missing)}; parts that need them will fail (--wheels)", file=sys.stderr)
name = torch.cuda.get_device_name() if sys.argv[1] == "no" else "CPU rehearsal"
print(re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"))
PYTHON
) || exit 65
results=$root/bench/results/$device
[[ $rehearse ]] && results=$root/runs/gpu-rehearsal
out=${OUT:-$results}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$root" || exit 65
commit=$(git describe --always --dirty --exclude='*' 2>/dev/null || echo unknown)

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

# The files with tests for a GPU. Other files need packages that a bare machine lacks.
gpu_files() { grep -lE 'mark\.gpu|tests\.implementations' tests/test_*.py; }
small="(bitwise or every_time) and cuda-triton"
rehearsed=(tests/test_ctc_peaks.py -k "the_same_frames_every_time and cpu-torch")

part_tests() {
  if [[ $rehearse ]]; then
    pytest tests "${rehearsed[@]}"
  else
    local parallel=()
    has xdist && parallel=(-n 4 --dist loadfile)
    # shellcheck disable=SC2046
    pytest tests $(gpu_files) -m gpu --continue-on-collection-errors --durations 20 "${parallel[@]}"
  fi
}

part_sanitizer() {
  if [[ $rehearse ]]; then
    pytest sanitizer "${rehearsed[@]}"
    return
  fi
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed; it is a part of the CUDA toolkit"; return 1; }
  local tool status=0
  for tool in memcheck racecheck; do
    under=(compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 86 --launch-timeout 0)
    seconds=$((limit / 2))
    # shellcheck disable=SC2046
    pytest "sanitizer-$tool" $(gpu_files) -m gpu -k "$small" --continue-on-collection-errors || status=$?
  done
  return $status
}

part_bench() {
  if [[ $rehearse ]]; then
    pytest bench bench/bench_alignment.py --size tiny --results "$out"
  else
    pytest bench bench
  fi
}

part_train() {
  local tiny=()
  [[ $rehearse ]] && tiny=(--tiny)
  limited "$python" bench/train_24gb.py --stage "$1" --out "$out" --minutes $((limit / 60 - 1)) "${tiny[@]}"
}

# pytest NAME ARGUMENTS…: its results go to gpu-NAME.xml. It is interrupted, not killed, so that it writes that file.
pytest() {
  local name=$1
  shift
  limited "${under[@]}" "$python" -m pytest -q -p no:cacheprovider --junitxml "$out/gpu-$name.xml" "$@"
}

limited() {
  if [[ $rehearse ]]; then
    "$@"
  else
    timeout --signal INT --kill-after 20 "$seconds" "$@"
  fi
}
under=() seconds=$limit

failed=0
for part in "${wanted[@]}"; do
  echo "== $part"
  start=$SECONDS
  case $part in
    train-*) part_train "${part#train-}" ;;
    *) "part_$part" ;;
  esac 2>&1 | tee "$out/gpu-$part.log"
  status=${PIPESTATUS[0]}
  ((status == 0)) || failed=$((failed + 1))
  "$python" - "$out/gpu-$part.json" "$part" "$status" "$((SECONDS - start))" "$device" "$commit" <<'PYTHON'
import datetime
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version


def installed(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


file, part, status, seconds, device, commit = sys.argv[1:]
record = {
    "part": part,
    "exit_status": int(status),
    "seconds": int(seconds),
    "device": device,
    "date": datetime.date.today().isoformat(),
    "commit": commit,
    "versions": {"python": platform.python_version()}
    | {name: installed(name) for name in ("torch", "triton", "transformers", "peft", "bitsandbytes", "flash-attn")},
}
with open(file, "w") as stream:
    stream.write(json.dumps(record, indent=1) + "\n")
PYTHON
  echo "== $part: exit status $status after $((SECONDS - start)) s"
done
exit "$failed"
