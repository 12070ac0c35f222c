#!/usr/bin/env bash
# Builds tadsr-train with MPI and tests training by several processes, also on two hosts, which are
# network namespaces. Needs root.
#
# Usage: scripts/test-mpi.sh [ARGUMENTS OF PYTEST]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[[ $(id -u) -eq 0 ]] || fail "network namespaces need root"
install_packages "${build_packages[@]}" libopenmpi-dev openmpi-bin libclang-dev ffmpeg iproute2 \
    python3-numpy python3-pytest
require_rust
cd "$root"
cargo build --release --locked --features mpi --bin tadsr-train
export TADSR_TRAIN=$target/release/tadsr-train
# Debian's Python, which has the modules of the packages.
exec /usr/bin/python3 -m pytest -p no:cacheprovider -q tests/mpi "$@"
