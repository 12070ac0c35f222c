#!/usr/bin/env bash
# Builds a folder that tests and times everything on a GPU, for a machine without Rust and the CUDA
# toolkit.
#
# Usage: benches/gpu.sh [FOLDER]      on the build machine; FOLDER is target/gpu by default
#        FOLDER/run.sh                on the machine with the GPU
#
# run.sh prints tables. It fails if a result differs from the CPU's by more than the rounding of
# 16-bit floats. Students need only the driver, and Python 3 to compare whole models. If PyTorch is
# installed, run.sh also times the same networks in it. If compute-sanitizer is on the PATH, run.sh
# detects accesses out of bounds and races with it.
#
# ResShift models and training are included if nvcc is installed here (docs/cuda.md). They need
# cuBLAS, cuRAND and NVRTC of the same major version of CUDA on the machine with the GPU; PyTorch's
# packages have them. Whole models are measured on the pictures of the folder in DATA.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../scripts/lib.sh"
cd "$root"
folder=$(realpath -m "${1:-$target/gpu}")
# Only a new folder or one of this script is emptied.
[[ ! -e $folder || -x $folder/run.sh ]] ||
    fail "'$folder' exists and was not made by this script: name another folder"
rm -rf "$folder"
mkdir -p "$folder"

# stage NAME TARGET CARGO_ARGUMENT...: builds one executable, stripped, as FOLDER/NAME.
stage() {
    local binary
    binary=$(cargo "${@:3}" --locked -p tadsr --no-default-features --message-format=json |
        sed -n 's/.*"name":"'"$2"'".*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
    [[ -n $binary ]] || fail "cargo does not report the path of $1"
    install -m 755 "$binary" "$folder/$1"
    strip "$folder/$1"
}
stage gpu gpu bench --bench gpu --no-run
stage tadsr-train tadsr-train build --release --bin tadsr-train --features train
if [[ -n ${CUDA_HOME-} ]] || command -v nvcc >/dev/null; then
    features=(--features train,cuda)
    stage unit tadsr test --release --lib --no-run "${features[@]}"
    for bench in resshift train; do stage "$bench" "$bench" bench --bench "$bench" --no-run "${features[@]}"; done
else
    say "no nvcc here: ResShift models and training are left out"
fi
cp -r benches/peers "$folder"
[[ -z ${DATA-} ]] || cp -rL "$DATA" "$folder/data"

cat >"$folder/run.sh" <<'RUN'
#!/usr/bin/env bash
# Arguments select parts. The default is all of them in the order below.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
(($#)) || set -- check eval speed kernels published training sanitize
failed=()
part() {
    printf '\n== %s: %s\n' "$1" "${*:2}"
    "${@:2}" || failed+=("$1")
}
python() { python3 -c "import $1" 2>/dev/null; }
# Returns true if the executable exists and its libraries are found.
runs() {
    [[ -x $1 ]] || return 1
    if ldd "$1" | grep 'not found'; then
        failed+=("$1: libraries are missing; PyTorch for the same major version of CUDA has them")
        return 1
    fi
}
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit --format=csv 2>/dev/null
if python torch; then
    # PyTorch's libraries are used here as well.
    libraries=$(python3 -c 'import glob, os, nvidia; print(":".join(p for r in nvidia.__path__ for p in glob.glob(r + "/*/lib") if os.path.isdir(p)))' 2>/dev/null)
    export LD_LIBRARY_PATH=${libraries:+$libraries:}${LD_LIBRARY_PATH-}
fi
export TADSR_BENCHES=$PWD TADSR_PEERS=$PWD/peers-data
for what; do
    case $what in
    check)
        part check ./gpu --compare
        # Kernels as the driver compiles them for a GPU newer than the prebuilt ones.
        part check-ptx ./gpu --short --ptx
        ;;
    eval)
        # Whole models, whose PSNR-Y may differ from the CPU's by up to 0.02 dB.
        [[ -d data ]] || { echo "no pictures: whole models are not measured"; continue; }
        for device in cpu cuda; do
            part "eval-$device" ./tadsr-train eval --data data --model tiny --model small --scale 2,4 --condition clean \
                --device $device --json "eval-$device.json"
        done
        part eval-difference python3 - <<'PYTHON'
import json
means = [{(m["method"], m["scale"]): m["psnr_y"] for m in json.load(open(f"eval-{d}.json"))["means"]} for d in ("cpu", "cuda")]
far = max(abs(means[0][key] - means[1][key]) for key in means[0])
print(f"PSNR-Y differs by at most {far:.4f} dB")
assert means[0].keys() == means[1].keys() and far <= 0.02
PYTHON
        ;;
    speed)
        part speed ./gpu
        if python torch; then part peers python3 peers/gpu.py; fi
        ;;
    kernels) ! runs unit || part kernels env TADSR_TEST_DEVICE=cuda ./unit ops::cuda --test-threads 1 ;;
    published)
        if runs resshift && python torch; then
            for side in 64 128; do part "published-$side" python3 peers/resshift.py --device cuda --side $side --threads 8; done
        fi
        ;;
    training) if runs train && python torch; then part training python3 peers/train.py --device cuda --threads 8; fi ;;
    sanitize)
        if command -v compute-sanitizer >/dev/null; then
            for tool in memcheck racecheck synccheck; do
                part "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 ./gpu --short
                ! runs unit || part "$tool-kernels" env TADSR_TEST_DEVICE=cuda compute-sanitizer --tool "$tool" \
                    --error-exitcode 1 ./unit ops::cuda --test-threads 1
            done
        fi
        ;;
    *) failed+=("$what: no such part") ;;
    esac
done
((${#failed[@]} == 0)) || { printf '\nfailed: %s\n' "${failed[*]}"; exit 1; }
RUN
chmod 755 "$folder/run.sh"
du -sh "$folder"
say "$folder is ready: run $folder/run.sh on a machine with a GPU"
