#!/usr/bin/env python3
"""Prints the licences of all crates that the binaries contain.

    cargo metadata --locked --format-version 1 --filter-platform TARGET | packaging/third_party.py
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

NAMES = ("LICEN", "COPYING", "COPYRIGHT", "NOTICE", "UNLICENSE")

metadata = json.load(sys.stdin)
packages = {package["id"]: package for package in metadata["packages"]}
nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}

own = set(metadata["workspace_members"])
linked, queue = set(own), list(own)
while queue:
    for dependency in nodes[queue.pop()]["deps"]:
        # Dependencies of builds and tests have a kind.
        normal = any(kind["kind"] is None for kind in dependency["dep_kinds"])
        if normal and dependency["pkg"] not in linked:
            linked.add(dependency["pkg"])
            queue.append(dependency["pkg"])

crates_by_text = defaultdict(list)
for package in sorted((packages[id] for id in linked - own), key=lambda p: (p["name"], p["version"])):
    crate = f"{package['name']} {package['version']}"
    print(f"{crate}: {package['license'] or 'see below'}")
    for file in sorted(Path(package["manifest_path"]).parent.iterdir()):
        if file.is_file() and file.name.upper().startswith(NAMES):
            crates_by_text[file.read_text(errors="replace").strip()].append(crate)

for text, crates in crates_by_text.items():
    print("\n" + "-" * 80 + f"\n{', '.join(crates)}:\n\n{text}")
