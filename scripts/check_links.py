#!/usr/bin/env python3
"""Checks that the links of a folder of HTML pages lead to files and anchors in it.

    scripts/check_links.py FOLDER

Links to other hosts are not fetched.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """Anchors and links of a page."""

    def __init__(self, path):
        super().__init__()
        self.path, self.anchors, self.links = path, {"", "top"}, []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes.get("id"), attributes.get("name")}
        self.links += [attributes[name] for name in ("href", "src") if attributes.get(name)]


def main():
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit(__doc__)
    root = Path(sys.argv[1]).resolve()
    pages = {path: Page(path) for path in root.rglob("*.html")}
    broken, count = [], 0
    for page in pages.values():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            count += 1
            base = root if parts.path.startswith("/") else page.path.parent
            target = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else page.path
            if target.is_dir():
                target /= "index.html"
            fragment = unquote(parts.fragment)
            if not target.is_file():
                broken.append(f"{page.path.relative_to(root)}: {link}: no such file")
            elif target in pages and fragment not in pages[target].anchors:
                broken.append(f"{page.path.relative_to(root)}: {link}: no such anchor")
    print(f"{len(pages)} pages, {count} links, {len(broken)} broken", *sorted(set(broken)), sep="\n")
    sys.exit(bool(broken) or not pages)


if __name__ == "__main__":
    main()
