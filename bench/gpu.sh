#!/usr/bin/env bash
# Takes what only a GPU can tell, in under ten minutes: the parts run in the order of their worth, each with a limit.
#
#   bench/gpu.sh [--rehearse] [--seconds N] [--wheels FOLDER] [--python PYTHON] [--commit COMMIT] [PART…]
#
# PART        facts      waits and kernels by file and line, time beside eager, compilations over varying lengths
#             tests      the tests marked gpu, without those of the torch implementation
#             linear     linear CTC at the design's shape, beside eager, two products and the recompute scheme
#             ctc        CTC
#             stages     a step of stages I and II
#             train-2    stage II of an 8B model under a cap of 22 GiB, beside what `soundwave memory` predicts
#             memcheck   a few of the tests under compute-sanitizer, with torch's caching of memory switched off
#             shrink     shrinking, cross entropy, alignment
#             torch      the tests of the torch implementation on the GPU
#             racecheck  a few of the tests under compute-sanitizer, which looks for races in shared memory
#             Without a PART all of these run. Three more run only by name: train-1, train-3 and bench (all benches).
# --seconds   time for everything (default 575). A part is stopped at its own limit; with more than 575 s the limits
#             grow in proportion. A part of whose limit less than a fifth is left does not run, and is named.
# --wheels    a folder of wheels that are put on PYTHONPATH for this run; nothing is installed or fetched. Wheels for
#             another Python are left out and named. The parts need PyTorch, transformers, peft, accelerate,
#             bitsandbytes, typer, rich, pydantic, soundfile, soxr, and pytest with pytest-benchmark and hypothesis.
#             pytest-xdist, nvtx and the benches' peers are optional.
# --python    the interpreter that has PyTorch (default: python3)
# --commit    the commit of the checkout, where git does not know it
# --rehearse  run every part on a CPU at tiny sizes, with the kernels in Triton's interpreter; nothing is measured
#
# One file comes back in $OUT, else in runs/: gpu-<device>-<time>.tgz. It is written again after each part, so that
# whatever ends the script leaves what was done. Unpacked in the checkout it puts results into bench/results/<device>/,
# where they can be committed as they came, and logs into runs/gpu/. A rehearsal puts both into runs/gpu-rehearsal/.
# The exit status is the number of parts that failed, were stopped, or did not run.

# shellcheck disable=SC2329 # the parts are called by their names
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
parts=(facts tests linear ctc stages train-2 memcheck shrink torch racecheck)
by_name=(train-1 train-3 bench)
# Seconds after which a part is stopped.
declare -A limits=(
  [facts]=100 [tests]=170 [linear]=100 [ctc]=45 [stages]=90 [train-2]=85 [memcheck]=60 [shrink]=60 [torch]=60
  [racecheck]=60 [train-1]=85 [train-3]=85 [bench]=500
)
usual=575                 # seconds for all parts, well inside ten minutes
log_bytes=$((4 << 20))    # of a log that are kept, its end
workers_at_most=14        # processes that run tests
grace=15                  # seconds from the interrupt to the kill
python=python3 wheels="" rehearse="" seconds=$usual commit="" wanted=()

fail() {
  echo "gpu.sh: $*" >&2
  exit 64
}

while (($#)); do
  case $1 in
    --rehearse) rehearse=yes ;;
    --seconds) seconds=${2:?--seconds takes a number}; shift ;;
    --wheels) wheels=${2:?--wheels takes a folder}; shift ;;
    --python) python=${2:?--python takes an interpreter}; shift ;;
    --commit) commit=${2:?--commit takes a commit}; shift ;;
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    -*) fail "unknown option $1; see --help" ;;
    *)
      [[ " ${parts[*]} ${by_name[*]} " == *" $1 "* ]] ||
        fail "unknown part '$1'; the parts are ${parts[*]} ${by_name[*]}"
      wanted+=("$1")
      ;;
  esac
  shift
done
((${#wanted[@]})) || wanted=("${parts[@]}")
[[ $seconds =~ ^[1-9][0-9]*$ ]] || fail "--seconds $seconds: it must be a whole number of at least 1"
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
ln -s "$root/bench" "$scratch/site/bench"
export PYTHONPATH="$scratch/site:$scratch/wheels${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 # the checkout's folder `kernels` must not be found from its root
export PYTHONUNBUFFERED=1                         # a part that is killed leaves what it had printed

unpack() {
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
    --upgrade --target "$scratch/wheels" "$@"
}
if [[ $wheels ]]; then
  shopt -s nullglob
  given=("$wheels"/*.whl)
  shopt -u nullglob
  # All at once, which is quick; one by one only if one of them does not fit.
  if ((${#given[@]})) && ! unpack "${given[@]}" >/dev/null 2>&1; then
    for wheel in "${given[@]}"; do
      unpack "$wheel" >"$scratch/pip.log" 2>&1 || echo "gpu.sh: left out $wheel: $(tail -n 1 "$scratch/pip.log")" >&2
    done
  fi
fi

# In the interpreter the tests would pass without a GPU, so no part may fall back to it.
export TRITON_INTERPRET=0
if [[ $rehearse ]]; then
  export TRITON_INTERPRET=1
  echo "gpu.sh: a rehearsal: everything runs on the CPU at tiny sizes, and the kernels run in Triton's interpreter"
fi

stamp=$(date -u +%Y%m%d-%H%M%S)
work=$scratch/work
if [[ $rehearse ]]; then
  logs=$work/runs/gpu-rehearsal/$stamp results=$work/runs/gpu-rehearsal/$stamp/results
else
  logs=$work/runs/gpu/$stamp results=$work/bench/results
fi
mkdir -p "$logs" "$results"
record() { "$python" "$root/bench/gpu_record.py" "$@"; }
found=$(record begin "$scratch/parts.json" ${rehearse:+--rehearse} --commit "$commit") || exit 65
read -r device workers <<<"$found"
mkdir -p "$results/$device"
parts_file=$results/$device/gpu-parts-$stamp.json
mv "$scratch/parts.json" "$parts_file"

out=${OUT:-$root/runs}
mkdir -p "$out"
out=$(cd "$out" && pwd)
unset OUT # Benches would copy their results to it, past the archive.
archive=$out/gpu-$device-$stamp.tgz
cd "$root" || exit 65

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

# ---------------------------------------------------------------- the parts

# The files with tests for a GPU. Other files need packages that a bare machine lacks.
mapfile -t gpu_files < <(grep -lE 'mark\.gpu|tests\.implementations' tests/test_*.py)
sanitized=(tests/test_vocab_rows.py tests/test_active_columns.py tests/test_ctc.py tests/test_ctc_peaks.py
  tests/test_norm.py tests/test_splice.py)

# choose EXPRESSION REHEARSED FILE…: the tests for a GPU in some files, by an expression of pytest's -k. In a rehearsal
# it is one test that needs no GPU.
choose() {
  if [[ $rehearse ]]; then
    chosen=(tests/test_ctc_peaks.py -m "not gpu" -k "$2 and same_frames_every_time")
  else
    chosen=("${@:3}" -m gpu -k "$1")
  fi
}

# Tests in several processes, as many as there are cores to spare and as the GPU's memory holds.
part_of_tests() {
  local parallel=() cores
  cores=$(nproc)
  if has xdist; then
    local number=$((cores > 2 ? cores - 2 : 1))
    ((number > workers_at_most)) && number=$workers_at_most
    ((number > workers)) && number=$workers
    parallel=(-n "$number" --dist worksteal)
  else
    echo "gpu.sh: pytest-xdist is not installed: the tests run in one process, and fewer of them in the same time"
  fi
  export OMP_NUM_THREADS=1
  # Only the process that collects the results is interrupted: its workers would lose them if they were, too. And the
  # log names each test when it ends, so that even a killed run tells what had passed.
  to=(--foreground)
  pytest "${chosen[@]}" -vv --continue-on-collection-errors --durations 20 \
    ${parallel[@]+"${parallel[@]}"}
}

part_tests() {
  choose "not cuda-torch" interpreter "${gpu_files[@]}"
  part_of_tests
}

part_torch() {
  choose cuda-torch cpu-torch "${gpu_files[@]}"
  part_of_tests
}

sanitize() {
  local tool=$1
  choose "cuda-triton and (every_time or statistics or over_20_runs or equal_again)" interpreter "${sanitized[@]}"
  if [[ $rehearse ]]; then
    echo "gpu.sh: compute-sanitizer needs a GPU: in this rehearsal the tests run without $tool"
  elif command -v compute-sanitizer >/dev/null; then
    under=(compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 86 --launch-timeout 0)
  else
    echo "gpu.sh: compute-sanitizer is not installed; it is a part of the CUDA toolkit"
    return 1
  fi
  export OMP_NUM_THREADS=1
  pytest "${chosen[@]}" --continue-on-collection-errors
}

part_memcheck() {
  # From torch's cache of memory the sanitizer sees large blocks only: an overrun inside one would stay unseen.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  sanitize memcheck
}

part_racecheck() { sanitize racecheck; }

# bench EXPRESSION REHEARSED FILE…: benches by an expression of -k, or in a rehearsal by REHEARSED.
bench() {
  local expression=$1 tiny=()
  [[ $rehearse ]] && expression=$2 tiny=(--size tiny)
  shift 2
  pytest "$@" --results "$results" ${commit:+--commit "$commit"} ${expression:+-k "$expression"} \
    ${tiny[@]+"${tiny[@]}"}
}

part_linear() {
  bench "both and not _peaky and not compiled" "both and random and not compiled" bench/bench_linear_ctc.py
}
part_ctc() { bench "both and V_ and not compiled and not flag" "both and V_32 and not compiled" bench/bench_ctc.py; }
part_stages() {
  local step="both and (stage_1_all or stage_2_all) and not compiled and not released"
  bench "$step" "$step" bench/bench_stages.py
}
part_shrink() {
  bench "both and not compiled and not loop and (all_30 or 3_to or frozen)" \
    "both and not compiled and frozen" \
    bench/bench_shrink.py bench/bench_linear_cross_entropy.py bench/bench_alignment.py
}
part_bench() { bench "" "both and V_32 and not compiled" bench/bench_*.py; }

part_facts() {
  limited "$python" bench/gpu_facts.py "$results/$device/gpu-facts-$stamp.json" --seconds $((allowed - 5)) \
    ${commit:+--commit "$commit"} ${rehearse:+--tiny}
}

# It kills its own process half a minute after the time that it is given.
part_train() {
  limited "$python" bench/train_24gb.py --stage "$1" --implementation fused --out "$results/$device" \
    --minutes "$(minutes $((allowed > 40 ? allowed - 30 : 10)))" ${commit:+--commit "$commit"} ${rehearse:+--tiny}
}

minutes() { printf '%d.%02d' $(($1 / 60)) $(($1 % 60 * 100 / 60)); }

# pytest ARGUMENTS…: its results also go to an XML file of the part.
pytest() {
  xml=$logs/$part.xml
  : >"$xml" # Without a result there is an empty file, so that the part is known to be one of tests.
  limited ${under[@]+"${under[@]}"} "$python" -m pytest -q -p no:cacheprovider --junitxml "$xml" "$@"
}

# limited COMMAND…: interrupt it after `allowed` seconds, so that it can write its files, and kill it soon after. A
# command in the background ignores interrupts unless that is taken back.
limited() {
  timeout ${to[@]+"${to[@]}"} --signal INT --kill-after "$grace" "$allowed" "$python" -c \
    'import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])' \
    "$@" &
  echo $! >"$scratch/running"
  wait $!
}

# ---------------------------------------------------------------- one after the other

keep() { (cd "$work" && tar czf "$archive.part" -- *) && mv "$archive.part" "$archive"; }

# Seconds that a part may still take, so that everything ends in time even if it has to be killed.
left() { echo $((seconds - grace - SECONDS)); }

end() {
  keep
  record summary "$parts_file"
  echo "gpu.sh: unpack $archive in the checkout: tar xzf $archive -C $root"
}

stopped() {
  trap '' INT TERM
  echo "gpu.sh: stopped in the part $part"
  [[ -f $scratch/running ]] && kill -TERM "$(cat "$scratch/running")" 2>/dev/null
  keep
  record part "$parts_file" "$part" 130 "$((SECONDS - start))" "$allowed" >/dev/null
  end
  exit 130
}
failed=0 part="" allowed=0 start=0
trap stopped INT TERM

for part in "${wanted[@]}"; do
  allowed=${limits[$part]}
  ((seconds > usual)) && allowed=$((allowed * seconds / usual))
  if (($(left) < (allowed + 4) / 5)); then
    record missed "$parts_file" "$part" "$(left)"
    failed=$((failed + 1))
    continue
  fi
  (($(left) < allowed)) && allowed=$(left)
  echo "== $part: at most $allowed s of $(left) s"
  start=$SECONDS
  log=$logs/$part.log
  case $part in
    train-*) (under=() to=() && part_train "${part#train-}") ;;
    *) (under=() to=() && "part_$part") ;;
  esac >"$log" 2>&1 &
  wait $!
  status=$?
  (($(stat -c %s "$log") > log_bytes)) && tail -c "$log_bytes" "$log" >"$log.end" && mv "$log.end" "$log"
  tail -n 6 "$log" | cut -c1-200
  xml=()
  [[ -f $logs/$part.xml ]] && xml=("$logs/$part.xml")
  record part "$parts_file" "$part" "$status" "$((SECONDS - start))" "$allowed" ${xml[@]+"${xml[@]}"} ||
    failed=$((failed + 1))
  keep
done
end
exit "$failed"
