#!/usr/bin/env bash
# Builds a folder that tests and times everything on a GPU, for a machine without Rust and the CUDA
# toolkit, and an archive of it.
#
# Usage: benches/gpu.sh [FOLDER]      on the build machine; FOLDER is target/gpu by default
#        FOLDER/run.sh                on the machine with the GPU: the students, in nine minutes
#        FOLDER/more.sh               whole models, ResShift models, training, sanitizers
#
# Students need only the driver. If PyTorch is installed on the machine with the GPU, the same
# networks are timed in it. If Nsight Compute (ncu) and compute-sanitizer are on the PATH, run.sh
# measures each kernel, and detects accesses out of bounds and races.
#
# ResShift models and training are included if nvcc is installed here (docs/cuda.md). They need
# cuBLAS, cuRAND and NVRTC of the same major version of CUDA on the machine with the GPU; PyTorch's
# packages have them. Whole models are measured on the pictures of the folder in DATA.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../scripts/lib.sh"
cd "$root"
folder=$(realpath -m "${1:-$target/gpu}")
# Only a new folder or one of this script is emptied.
[[ ! -e $folder || -e $folder/.made-by-gpu.sh ]] ||
    fail "'$folder' exists and was not made by this script: name another folder"
rm -rf "$folder"
mkdir -p "$folder"
touch "$folder/.made-by-gpu.sh"

# stage NAME TARGET CARGO_ARGUMENT...: builds one executable, stripped, as FOLDER/NAME.
stage() {
    local binary
    binary=$(cargo "${@:3}" --locked -p tadsr --no-default-features --message-format=json-render-diagnostics |
        sed -n 's/.*"name":"'"$2"'".*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
    [[ -n $binary ]] || fail "$1 was not built"
    install -m 755 "$binary" "$folder/$1"
    strip "$folder/$1"
}
stage gpu gpu bench --bench gpu --no-run --features emulator
stage tadsr-train tadsr-train build --release --bin tadsr-train --features train
if [[ -n ${CUDA_HOME-} ]] || command -v nvcc >/dev/null; then
    features=(--features train,cuda)
    stage unit tadsr test --release --lib --no-run "${features[@]}"
    for bench in resshift train; do stage "$bench" "$bench" bench --bench "$bench" --no-run "${features[@]}"; done
else
    say "no nvcc here: ResShift models and training are left out"
fi
for source in ceilings candidates; do scripts/kernels.sh "benches/gpu/$source.cu" "$folder" ptx 90a; done
mkdir "$folder/peers"
cp benches/peers/*.py "$folder/peers"
[[ -z ${DATA-} ]] || cp -rL "$DATA" "$folder/data"

cat >"$folder/steps.sh" <<'STEPS'
# shellcheck shell=bash
# Steps with limits, for run.sh and more.sh. Each writes its output to $OUT/STEP.txt, and a line to
# $OUT/summary.txt. A failure stops only what depends on it.
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 1
OUT=${OUT:-$PWD/out}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 TADSR_BENCHES=$PWD TADSR_PEERS=$PWD/peers-data
# Seconds for all steps, a factor for their limits, and the steps to run if not all.
BUDGET=${BUDGET:-540}
PATIENCE=${PATIENCE:-1}
failed=()

# step NAME LIMIT COMMAND...
step() {
    local name=$1 limit=$((PATIENCE * $2)) status=0 left=$((BUDGET - SECONDS)) start=$SECONDS
    shift 2
    [[ -z ${STEPS-} || " $STEPS " == *" $name "* ]] || return 0
    if ((left < 5)); then
        echo "$name: left out, no time" | tee -a "$OUT/summary.txt"
        return 1
    fi
    printf '\n== %s: %s\n' "$name" "$*"
    timeout -k 5 "$((limit < left ? limit : left))" "$@" >"$OUT/$name.txt" 2>&1 || status=$?
    tail -n 60 "$OUT/$name.txt"
    local result=passed
    if ((status)); then
        result="failed with status $status"
        failed+=("$name")
    fi
    echo "$name: $result, $((SECONDS - start)) s" | tee -a "$OUT/summary.txt"
    return "$status"
}

# optional COMMAND NAME LIMIT COMMAND...: a step whose first command may be missing.
optional() {
    if command -v "$1" >/dev/null; then
        step "${@:2}"
    elif [[ -z ${STEPS-} || " $STEPS " == *" $2 "* ]]; then
        echo "$2: left out, no $1" | tee -a "$OUT/summary.txt"
    fi
}

# torch NAME LIMIT COMMAND...: a step that needs PyTorch.
torch() {
    if python3 -c 'import torch' 2>/dev/null; then
        step "$@"
    elif [[ -z ${STEPS-} || " $STEPS " == *" $1 "* ]]; then
        echo "$1: left out, no PyTorch" | tee -a "$OUT/summary.txt"
    fi
}

finish() {
    printf '\n== summary\n'
    cat "$OUT/summary.txt"
    ((${#failed[@]} == 0)) || exit 1
    exit 0
}

rm -f "$OUT/summary.txt"
export PATH=$PATH:/usr/local/cuda/bin
step machine 20 bash -c 'nvidia-smi -q | head -80
    nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,pcie.link.gen.current,pcie.link.width.current,mig.mode.current --format=csv
    ldd --version | head -1; nproc; ldd ./gpu'
STEPS

cat >"$folder/run.sh" <<'RUN'
#!/usr/bin/env bash
# The students on the GPU, the most telling steps first. BUDGET is the time in seconds (540), STEPS
# selects steps, OUT is the folder for results.
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/steps.sh"
sanitizer=(compute-sanitizer --error-exitcode 1 --tool)
metrics=gpu__time_duration.sum,dram__bytes.sum,l1tex__data_pipe_lsu_wavefronts.sum,sm__inst_executed.sum
metrics+=,sm__inst_executed_pipe_tensor.sum
if step short 60 ./gpu --short; then
    step speed 90 ./gpu --speed
    optional ncu kernels 60 ncu --clock-control none --csv --metrics "$metrics" ./gpu --frames 2
    step ceilings 40 ./gpu --ceilings .
    step candidates 60 ./gpu --candidates . --times
    torch eager 60 python3 peers/gpu.py --ways eager,graph
    step compare 120 ./gpu --compare
    step streams 45 ./gpu --streams
    # Kernels as the driver compiles them for a GPU newer than the prebuilt ones.
    step ptx 30 ./gpu --short --ptx
    optional compute-sanitizer memcheck 60 "${sanitizer[@]}" memcheck ./gpu --short
    torch compile 120 python3 peers/gpu.py --ways compile
else
    step ptx 30 ./gpu --short --ptx
    step bisect 60 ./gpu --bisect
    step bisect-ptx 60 ./gpu --bisect --ptx
    optional compute-sanitizer memcheck 120 "${sanitizer[@]}" memcheck ./gpu --short
    optional compute-sanitizer racecheck 120 "${sanitizer[@]}" racecheck ./gpu --short
fi
finish
RUN

cat >"$folder/more.sh" <<'MORE'
#!/usr/bin/env bash
# Whole models, ResShift models and training on the GPU. As run.sh.
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/steps.sh"
if python3 -c 'import torch' 2>/dev/null; then
    # PyTorch's libraries are used here as well.
    libraries=$(python3 -c 'import glob, os, nvidia; print(":".join(p for r in nvidia.__path__ for p in glob.glob(r + "/*/lib") if os.path.isdir(p)))' 2>/dev/null)
    export LD_LIBRARY_PATH=${libraries:+$libraries:}${LD_LIBRARY_PATH-}
fi
if [[ -d data ]]; then
    for device in cpu cuda; do
        step "eval-$device" 120 ./tadsr-train eval --data data --model tiny --model small --scale 2,4 \
            --condition clean --device $device --json "$OUT/eval-$device.json"
    done
    # PSNR-Y of whole models may differ from the CPU's by up to 0.02 dB.
    step eval-difference 10 python3 -c '
import json, sys
means = [{(m["method"], m["scale"]): m["psnr_y"] for m in json.load(open(f"{sys.argv[1]}/eval-{d}.json"))["means"]} for d in ("cpu", "cuda")]
far = max(abs(means[0][key] - means[1][key]) for key in means[0])
print(f"PSNR-Y differs by at most {far:.4f} dB")
assert means[0].keys() == means[1].keys() and far <= 0.02
' "$OUT"
fi
sanitizer=(env TADSR_TEST_DEVICE=cuda compute-sanitizer --error-exitcode 1 --tool)
if [[ -x unit ]]; then
    step kernels 120 env TADSR_TEST_DEVICE=cuda ./unit ops::cuda --test-threads 1
    for side in 64 128; do
        torch "published-$side" 120 python3 peers/resshift.py --device cuda --side $side --threads 8
    done
    torch training 120 python3 peers/train.py --device cuda --threads 8
    for tool in memcheck racecheck synccheck; do
        optional compute-sanitizer "$tool" 120 "${sanitizer[@]}" "$tool" ./unit ops::cuda --test-threads 1
    done
fi
finish
MORE
chmod 755 "$folder/run.sh" "$folder/more.sh"
tar -C "$(dirname "$folder")" -cJf "$folder.tar.xz" "$(basename "$folder")"
size=$(stat -c %s "$folder.tar.xz")
((size < 60 << 20)) || fail "$folder.tar.xz has $((size >> 20)) MiB; the limit is 60"
say "$folder.tar.xz ($((size >> 10)) KiB) is ready: run $(basename "$folder")/run.sh on a machine with a GPU"
