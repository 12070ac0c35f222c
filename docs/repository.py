#!/usr/bin/env python3
"""Preprocessor of mdBook: links to files outside docs/ become links to the repository."""

import json
import re
import sys
from pathlib import Path

REPOSITORY = "https://github.com/tadsr/tadsr/blob/main/"
DOCS = Path(__file__).parent


def absolute(match):
    path = match[1].split("#")[0]
    if not (DOCS.parent / path).exists():
        sys.exit(f"a page links to ../{path}, which does not exist")
    return f"]({REPOSITORY}{match[1]})"


def convert(node):
    """Converts all pages below a node of the book."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if key == "content" and isinstance(value, str):
            node[key] = re.sub(r"\]\(\.\./([^)]+)\)", absolute, value)
        elif isinstance(value, (dict, list)):
            convert(value)


# mdBook first asks whether the preprocessor supports a renderer.
if sys.argv[1:2] != ["supports"]:
    _, book = json.load(sys.stdin)
    convert(book)
    json.dump(book, sys.stdout)
