#!/bin/sh
# Installs the GStreamer element tadsrupscale and the tool tadsr-train from this folder.
set -eu

usage() {
    cat <<'TEXT'
Usage: ./install.sh [--prefix DIR] [--uninstall]

  --prefix DIR  folder to install to (default: ~/.local, where GStreamer finds the plugin of a user)
  --uninstall   remove what an earlier run has installed in the prefix
TEXT
}

fail() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 1
}

prefix=${HOME:-}/.local uninstall=
while [ $# -gt 0 ]; do
    case $1 in
        --prefix) [ $# -gt 1 ] || fail "--prefix needs a folder"; prefix=$2; shift ;;
        --prefix=*) prefix=${1#*=} ;;
        --uninstall) uninstall=yes ;;
        -h | --help) usage; exit 0 ;;
        *) fail "unknown argument '$1'; see --help" ;;
    esac
    shift
done
case $prefix in
    /*) ;;
    *) prefix=$PWD/$prefix ;;
esac
list=share/doc/tadsr/installed-files

if [ -n "$uninstall" ]; then
    [ -f "$prefix/$list" ] || fail "nothing is installed in '$prefix'"
    cd "$prefix"
    while read -r file; do
        rm -f -- "$file"
        rmdir -p -- "$(dirname "$file")" 2>/dev/null || true
    done <"$list"
    rm -f -- "$list"
    rmdir -p share/doc/tadsr 2>/dev/null || true
    echo "Removed from $prefix"
    exit 0
fi

cd "$(dirname "$0")"
bin/tadsr-train --version >/dev/null ||
    fail "this system lacks GStreamer 1.22 or newer, or glibc 2.36 or newer. Debian, Ubuntu:
    apt-get install gstreamer1.0-tools gstreamer1.0-plugins-base gstreamer1.0-plugins-good \\
        gstreamer1.0-plugins-bad gstreamer1.0-plugins-ugly gstreamer1.0-libav"
mkdir -p "$prefix/share/doc/tadsr" ||
    fail "'$prefix' cannot be written; choose another --prefix or become root"
plugins=lib/gstreamer-1.0
[ "$prefix" != "${HOME:-}/.local" ] || plugins=share/gstreamer-1.0/plugins

: >"$prefix/$list"
find bin lib share -type f | while read -r file; do
    case $file in
        lib/*) to=$plugins/${file##*/} ;;
        *) to=$file ;;
    esac
    echo "$to" >>"$prefix/$list"
    mkdir -p "$prefix/$(dirname "$to")"
    cp -p -- "$file" "$prefix/$to"
done
echo "Installed in $prefix"
if [ "$plugins" = lib/gstreamer-1.0 ]; then
    echo "Tell GStreamer: export GST_PLUGIN_PATH=$prefix/$plugins"
fi
