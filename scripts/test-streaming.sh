#!/usr/bin/env bash
# Tests the servers in examples/streaming with real sources and clients.
#
# Usage: scripts/test-streaming.sh [--no-install] [ARGUMENTS OF PYTEST]
#
# GST_PLUGIN_PATH selects the folder of the plugin. Otherwise the script builds it.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
if [[ ${1-} == --no-install ]]; then
    shift
else
    install_packages "${build_packages[@]}" "${gstreamer_packages[@]}" "${streaming_packages[@]}"
fi
if [[ -z ${GST_PLUGIN_PATH-} ]]; then
    require_rust
    build_plugin
fi
cd "$root"
# Debian's Python, which has the modules of the packages.
exec /usr/bin/python3 -m pytest -p no:cacheprovider -q tests/streaming "$@"
