#!/usr/bin/python3
"""Writes docs/element-reference.md from the properties of the element that GStreamer loads.

    GST_PLUGIN_PATH=target/debug scripts/element_reference.py [--check]

With --check, it writes nothing and fails if the file differs.
"""

import difflib
import re
import sys
from pathlib import Path

import gi

gi.require_version("Gst", "1.0")
from gi.repository import GObject, Gst  # noqa: E402

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "element-reference.md"
NAME = "tadsrupscale"
TYPES = {"gchararray": "string", "gdouble": "double", "guint": "uint", "guint64": "uint64", "GstStructure": "structure"}
LARGEST = {"guint": (1 << 32) - 1, "guint64": (1 << 64) - 1, "gdouble": sys.float_info.max}


def range_of(spec):
    if not hasattr(spec, "minimum") or not spec.flags & GObject.ParamFlags.WRITABLE:
        return ""
    low, high = f"{spec.minimum:.10g}", f"{spec.maximum:.10g}"
    return f"{low} or more" if spec.maximum == LARGEST[spec.value_type.name] else f"{low} to {high}"


def default_of(spec):
    if not spec.flags & GObject.ParamFlags.WRITABLE:
        return ""
    value = spec.default_value
    return f"`{getattr(value, 'value_nick', value)}`".replace(".0`", "`")


def changes(spec):
    """Returns the states in which the property changes."""
    if not spec.flags & GObject.ParamFlags.WRITABLE:
        return "read-only"
    if not spec.flags & Gst.PARAM_MUTABLE_PLAYING:
        return "in NULL and READY"
    return "live, controllable" if spec.flags & Gst.PARAM_CONTROLLABLE else "live"


def enum_values(spec):
    return [spec.enum_class.__enum_values__[key] for key in sorted(spec.enum_class.__enum_values__)]


def page(element):
    kind = type(element).__gtype__
    specs = [spec for spec in element.list_properties() if spec.owner_type == kind]
    described = set(re.findall(r"^### ([\w-]+)$", (DOCS / "element.md").read_text(), re.M))
    factory = element.get_factory()
    lines = [
        "# Element reference",
        "",
        "<!-- scripts/element_reference.py writes this page from the plugin. -->",
        "",
        f"{factory.get_metadata('description')}. [The element](element.md) describes its behaviour.",
        "",
        f"- Name: `{NAME}`",
        f"- Class: `{factory.get_metadata('klass')}`",
        f"- Base class: `{kind.parent.name}`",
        "",
        "## Properties",
        "",
        'A "live" property changes while the pipeline plays. A "controllable" one also follows a',
        "`GstController` control source.",
        "",
        "| name | type | range | default | changes |",
        "|---|---|---|---|---|",
    ]
    for spec in specs:
        name = f"[`{spec.name}`](element.md#{spec.name})" if spec.name in described else f"`{spec.name}`"
        enum = spec.value_type.is_a(GObject.TYPE_ENUM)
        type_name = "enum" if enum else TYPES[spec.value_type.name]
        values = ", ".join(f"`{value.value_nick}`" for value in enum_values(spec)) if enum else range_of(spec)
        lines.append(f"| {name} | {type_name} | {values} | {default_of(spec)} | {changes(spec)} |")
    lines += ["", "### Descriptions", "", "| name | description |", "|---|---|"]
    lines += [f"| `{spec.name}` | {spec.blurb} |" for spec in specs]
    for spec in specs:
        if spec.value_type.is_a(GObject.TYPE_ENUM):
            lines += ["", f"### Values of {spec.name}", "", f"`{spec.value_type.name}`:", ""]
            lines += ["| value | number | meaning |", "|---|---|---|"]
            lines += [f"| `{v.value_nick}` | {int(v)} | {v.value_name.partition(': ')[2]} |" for v in enum_values(spec)]
    signals = GObject.signal_list_names(kind)
    lines += ["", "## Signals", ""]
    lines += [f"- `{name}`" for name in signals] or ["None of its own."]
    lines += ["", "## Pads", "", "| pad | direction | presence |", "|---|---|---|"]
    templates = sorted(factory.get_static_pad_templates(), key=lambda template: template.direction, reverse=True)
    for each in templates:
        lines.append(f"| `{each.name_template}` | {each.direction.value_nick} | {each.presence.value_nick} |")
    caps = {each.get_caps().to_string() for each in templates}
    assert len(caps) == 1, "the templates have different caps"
    lines += ["", "Both have these caps:", "", "```text", *wrapped(caps.pop()), "```", ""]
    return "\n".join(lines)


def wrapped(caps):
    """Returns caps in lines, with a structure and then a field on each."""
    for structure in caps.split("; "):
        fields = re.split(r", (?=[\w-]+=)", structure)
        for index, field in enumerate(fields):
            text = field.replace("(string)", "").replace("(int)", "").replace("(fraction)", "")
            end = "," if index < len(fields) - 1 else ""
            indent = "    " if index else ""
            line = indent
            for word in (text + end).split(" "):
                if len(line) + len(word) > 96:
                    yield line.rstrip()
                    line = "        "
                line += word + " "
            yield line.rstrip()


def main():
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(__doc__)
    Gst.init(None)
    element = Gst.ElementFactory.make(NAME)
    if not element:
        sys.exit(f"GStreamer does not find {NAME}: set GST_PLUGIN_PATH")
    text = page(element)
    if sys.argv[1:] == []:
        PAGE.write_text(text)
    elif text != (old := PAGE.read_text() if PAGE.exists() else ""):
        sys.stdout.writelines(
            difflib.unified_diff(old.splitlines(True), text.splitlines(True), "committed", "generated")
        )
        sys.exit(f"{PAGE.name} is not that of the plugin: run scripts/element_reference.py")


if __name__ == "__main__":
    main()
