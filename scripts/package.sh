#!/usr/bin/env bash
# Builds a Debian package and a tarball with install.sh in target/package. The oldest system that
# they run on is the one that builds them: use Debian 12 for Debian 12 and newer.
#
# Usage: scripts/package.sh [--no-install]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
case ${1-} in
    '') install_packages "${build_packages[@]}" dpkg-dev python3 ;;
    --no-install) ;;
    *) fail "unknown argument '$1'; the only one is --no-install" ;;
esac
require_rust
cd "$root"
version=$(sed -n '0,/^version = "\(.*\)"/s//\1/p' Cargo.toml)
architecture=$(dpkg --print-architecture)
multiarch=$(dpkg-architecture -qDEB_HOST_MULTIARCH)
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct 2>/dev/null || date +%s)
export SOURCE_DATE_EPOCH
work=$target/package-work out=$target/package
rm -rf "$work" "$out"
mkdir -p "$work/debian" "$out"

# One build, which compiles the library once. The linker removes what the plugin does not use.
cargo build --release --locked -p gst-plugin-tadsr -p tadsr --lib --bin tadsr-train

name=tadsr-$version-$(uname -m)-linux
tree=$work/$name doc=$work/$name/share/doc/tadsr
install -Dm 644 -s "$target/release/libgsttadsr.so" "$tree/lib/gstreamer-1.0/libgsttadsr.so"
install -Dm 755 -s "$target/release/tadsr-train" "$tree/bin/tadsr-train"
install -Dm 644 -t "$tree/share/gstreamer-1.0/presets" plugins/tadsr/presets/*.prs
"$tree/bin/tadsr-train" manual "$tree"
install -Dm 644 packaging/copyright "$doc/copyright"
install -m 644 CHANGELOG.md "$doc/changelog"
install -m 644 models/DATA.md "$doc/DATA.md"
cargo metadata --locked --format-version 1 --filter-platform "$(rustc --print host-tuple)" |
    packaging/third_party.py >"$doc/third-party-licences"
install -Dm 644 -t "$doc/examples/streaming" examples/streaming/*.*
chmod 755 "$doc"/examples/streaming/{rtsp,hls,srt,webrtc,compare}.py
install -Dm 644 -t "$doc/examples/cluster" examples/cluster/*.*
chmod 755 "$doc"/examples/cluster/*.{sh,py}
gzip -9n "$doc"/{changelog,DATA.md,third-party-licences} "$tree"/share/man/man1/*

say "Writing the tarball"
cp packaging/install.sh "$tree"
cp LICENSE-* plugins/tadsr/LICENSE-MPL-2.0 "$doc"
tar -C "$work" --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner \
    -czf "$work/$name.tar.gz" "$name"
# A Debian package refers to the texts in /usr/share/common-licenses instead.
rm "$doc"/LICENSE-*

say "Writing the package"
usr=$work/deb/usr
mkdir -p "$usr/lib/$multiarch"
cp -r "$tree"/{bin,share} "$usr"
cp -r "$tree/lib/gstreamer-1.0" "$usr/lib/$multiarch"
mv "$usr/share/zsh/site-functions" "$usr/share/zsh/vendor-completions"
find "$work/deb" -type d -exec chmod 755 {} +
maintainer='The TADSR developers <tadsr@users.noreply.github.com>'
fields="Package: tadsr
Architecture: $architecture
Maintainer: $maintainer
Section: video
Priority: optional
Homepage: https://github.com/tadsr/tadsr"
gzip -9n >"$usr/share/doc/tadsr/changelog.Debian.gz" <<TEXT
tadsr ($version-1) unstable; urgency=medium

  * See changelog.gz.

 -- ${maintainer}  $(date -R -d "@$SOURCE_DATE_EPOCH")
TEXT
printf 'Source: tadsr\n\n%s\n' "$fields" >"$work/debian/control"
libraries=$(cd "$work" && dpkg-shlibdeps -O "$usr/bin/tadsr-train" "$usr/lib/$multiarch/gstreamer-1.0/libgsttadsr.so")
mkdir "$work/deb/DEBIAN"
cat >"$work/deb/DEBIAN/control" <<TEXT
$fields
Version: $version-1
Installed-Size: $(du -sk "$usr" | cut -f 1)
Depends: ${libraries#*=}, gstreamer1.0-plugins-base (>= 1.22), gstreamer1.0-plugins-good (>= 1.22)
Recommends: gstreamer1.0-tools, gstreamer1.0-plugins-bad, gstreamer1.0-plugins-ugly, gstreamer1.0-libav
Suggests: gir1.2-gst-rtsp-server-1.0, python3-gi, python3-prometheus-client
Description: video upscaling with small neural networks in GStreamer
 The GStreamer element tadsrupscale enlarges raw video by a factor of 1 to 4.
 The command tadsr-train upscales images and videos, and trains and measures
 the networks. The networks are compiled into both and need only a CPU.
TEXT
(cd "$work/deb" && find usr -type f -exec md5sum {} + >DEBIAN/md5sums)
dpkg-deb --root-owner-group -Zxz --build "$work/deb" "$work" >/dev/null
mv "$work"/*.deb "$work"/*.tar.gz "$out"

ls -l "$out"
dpkg-deb -f "$out"/*.deb Depends
