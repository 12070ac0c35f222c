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
    # A Node.js that is not Debian's has its own npm.
    command -v npm >/dev/null || install_packages npm
    npm install --silent --no-save --prefix "$target/playwright" "$playwright"
fi
export NODE_PATH=$target/playwright/node_modules
if [[ -z ${GST_PLUGIN_PATH-} ]]; then
    require_rust
    build_plugin
fi
cd "$root"
# Debian's Python, which has the modules of the packages.
exec /usr/bin/python3 -m pytest -p no:cacheprovider -q tests/streaming "$@"
