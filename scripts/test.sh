#!/usr/bin/env bash
# Runs all checks: format, lints, the plugin in gst-inspect-1.0, documentation, tests.
#
# Usage: scripts/test.sh [--no-install]
#
# Installs missing packages first (Debian and Ubuntu; Rust is only checked), unless --no-install is
# given. Builds everything once, in the dev profile. A failed check does not stop the others. The
# tests run last. Tests that need the reference values in ../shared run if these exist. If
# TADSR_REQUIRE_REFERENCE is set, missing values are an error.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
exec </dev/null

case ${1-} in
    '') install_packages "${build_packages[@]}" "${gstreamer_packages[@]}" "${text_packages[@]}" \
        "${test_packages[@]}" "${docs_packages[@]}" ;;
    --no-install) ;;
    *) fail "unknown argument '$1'; the only one is --no-install" ;;
esac
require_rust
cd "$root"
failed=()

# check NAME COMMAND...: runs a check, and records a failure.
check() {
    local name=$1
    shift
    say "" "== $name: $*"
    "$@" || failed+=("$name")
}

# Loads the element as a user's GStreamer does. Fails on warnings and blacklisted plugins.
inspect() {
    local log registry with
    log=$(mktemp)
    registry=$(mktemp -u)
    with=(env GST_REGISTRY="$registry" GST_PLUGIN_PATH="$target/debug" G_DEBUG=fatal-warnings)
    if ! "${with[@]}" gst-inspect-1.0 tadsrupscale >"$log" 2>&1 || grep WARN "$log"; then
        cat "$log"
        return 1
    fi
    if "${with[@]}" gst-inspect-1.0 --print-blacklist | grep gsttadsr; then
        return 1
    fi
    sed -n '1,/Version/p' "$log"
    rm -f "$log" "$registry"
}

# Runs pipelines, and fails if an object of GStreamer is alive at the end. One is meant to be: the
# caps of the pad templates.
leaks() {
    local log properties
    log=$(mktemp)
    for properties in model=auto 'model=small scale=1.5' 'strength=0 stats-interval=1' overload=adapt; do
        # shellcheck disable=SC2086
        env GST_PLUGIN_PATH="$target/debug" GST_TRACERS=leaks GST_DEBUG=GST_TRACER:7 GST_DEBUG_NO_COLOR=1 \
            gst-launch-1.0 -q videotestsrc num-buffers=20 ! video/x-raw,width=64,height=48 ! \
            tadsrupscale device=cpu $properties ! fakesink >"$log" 2>&1 || return
        grep -q 'object-alive.class' "$log" || return
        ! grep 'object-alive, ' "$log" | grep -v 'format string\|memory:CUDAMemory' || return
    done
    rm -f "$log"
}

# Without the component the check cannot run, which is not a failure of the code.
for component in fmt clippy; do
    cargo $component --version >/dev/null 2>&1 ||
        fail "'cargo $component' is missing; install it with 'rustup component add rustfmt clippy'"
done
check format cargo fmt --all --check
check lints cargo clippy --locked --workspace --all-targets -- -D warnings
check lints-without-training cargo clippy --locked -p tadsr --no-default-features --all-targets -- -D warnings
# All targets, because otherwise cargo would select other features and build everything twice.
check build cargo build --locked --workspace --all-targets
check inspect inspect
check leaks leaks
check element-reference env GST_PLUGIN_PATH="$target/debug" scripts/element_reference.py --check
check documentation scripts/build-docs.sh "$@"
if cargo nextest --version >/dev/null 2>&1; then
    check examples-in-documentation cargo test --locked --workspace --doc
    tests=(cargo nextest run --locked --workspace --no-fail-fast)
else
    tests=(cargo test --locked --workspace --no-fail-fast)
fi
# The tests of the element also fail on warnings of GLib, and if an element, a pad or a buffer is
# alive at the end of a test's process. Buffers that a lost CUDA device may still access are kept.
element_tests() {
    local leaks=$target/leaks log kinds leaked=0
    rm -rf "$leaks"
    mkdir -p "$leaks"
    G_DEBUG=fatal-warnings GST_TRACERS=leaks GST_DEBUG=GST_TRACER:7 GST_DEBUG_NO_COLOR=1 GST_DEBUG_FILE=$leaks/%p.log \
        "${tests[@]}" -E 'package(gst-plugin-tadsr)' 2>&1 || return
    [[ $(grep -l 'object-alive' "$leaks"/*.log | wc -l) -gt 100 ]] || fail "the tests of the element wrote no logs to $leaks"
    for log in "$leaks"/*.log; do
        kinds='GstTadsrUpscale|GstPad|GstBus'
        grep -q '(string)GstTadsrPinnedAllocator' "$log" || kinds+='|GstBuffer|GstVideoBufferPool'
        ! grep -E "object-alive, type-name=\\(string\\)($kinds)," "$log" || leaked=1
    done
    return "$leaked"
}
say "" "== tests: ${tests[*]}"
if [[ ${tests[1]} == nextest ]]; then
    "${tests[@]}" -E 'not package(gst-plugin-tadsr)' 2>&1 || failed+=(tests)
    check element-tests element_tests
else
    "${tests[@]}" --exclude gst-plugin-tadsr 2>&1 || failed+=(tests)
    check element-tests env G_DEBUG=fatal-warnings cargo test --locked --no-fail-fast -p gst-plugin-tadsr
fi

# Tests that compare with reference values, which are too large for the repository.
if [[ -d ../shared/fixtures && -d ../shared/metrics ]]; then
    reference=(cargo nextest run --locked --workspace --no-fail-fast --run-ignored only -E 'not test(in_this_process)')
    cargo nextest --version >/dev/null 2>&1 ||
        reference=(cargo test --locked --workspace --no-fail-fast -- --ignored --skip in_this_process)
    say "" "== tests with reference values: ${reference[*]}"
    "${reference[@]}" 2>&1 || failed+=(reference-tests)
    say "" "The tests with reference values were run."
else
    say "" "The tests with reference values were NOT run: ../shared/fixtures or ../shared/metrics is missing."
    [[ -z ${TADSR_REQUIRE_REFERENCE-} ]] || failed+=(reference-tests)
fi
[[ ${#failed[@]} -eq 0 ]] || say "These checks failed (see above): ${failed[*]}"
[[ ${#failed[@]} -eq 0 ]]
