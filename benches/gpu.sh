#!/usr/bin/env bash
# Builds a folder that proves and times the CUDA engine on a machine with an NVIDIA driver and nothing else.
#
# Usage: benches/gpu.sh [FOLDER]      here; FOLDER is target/gpu by default
#        FOLDER/run.sh                there
#
# run.sh ends with an error when a result differs from the CPU's by more than f16 explains. With compute-sanitizer on the
# PATH it looks for accesses out of bounds and races first, and with PyTorch it times the same networks there.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../scripts/lib.sh"
cd "$root"
folder=$(realpath -m "${1:-$target/gpu}")
mkdir -p "$folder"
# Without the default features nothing but the C library is linked.
binary=$(cargo bench --locked -p tadsr --no-default-features --bench gpu --no-run --message-format=json |
    sed -n 's/.*"name":"gpu".*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
[[ -n $binary ]] || fail "cargo did not say where the benchmark is"
install -m 755 "$binary" "$folder/gpu"
install -m 644 benches/peers/gpu.py "$folder/gpu.py"
cat >"$folder/run.sh" <<'RUN'
#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        compute-sanitizer --tool "$tool" --error-exitcode 1 ./gpu --compare
    done
fi
./gpu
if python3 -c 'import torch' 2>/dev/null; then
    python3 gpu.py
else
    echo "no PyTorch: nothing to compare with"
fi
RUN
chmod 755 "$folder/run.sh"
say "$folder is ready: run $folder/run.sh on a machine with a GPU"
