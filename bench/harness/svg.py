"""Bar charts by hand: no library to keep, and colours that follow the reader's light or dark page."""
from xml.sax.saxutils import escape

STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #24292f; }
  .title { font-size: 14px; font-weight: 600; } .faint { fill: #57606a; } .value { paint-order: stroke; stroke: #fff; stroke-width: 4px; } .grid { stroke: #d0d7de; } .mark { stroke: #57606a; stroke-dasharray: 4 3; }
  .envoy { fill: #8c959f; } .nginx { fill: #4ac26b; } .haproxy { fill: #54aeff; } .outrigger { fill: #d4590f; } .target { stroke: #cf222e; stroke-width: 2; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; } .faint { fill: #9198a1; } .value { stroke: #0d1117; } .grid { stroke: #3d444d; } .mark { stroke: #9198a1; }
    .envoy { fill: #6e7681; } .nginx { fill: #3fb950; } .haproxy { fill: #388bfd; } .outrigger { fill: #f0883e; } .target { stroke: #ff7b72; }
  }
"""
LEFT, WIDTH, BAR, GAP = 240, 800, 13, 14


def chart(title, groups, unit, names, top=None, mark=None):
    """`groups`: (label, {peer: value, "target": limit}); `names`: peer -> what it is called; `mark`: a line across all, at a value."""
    values = [v for _, bars in groups for v in bars.values() if v is not None]
    top = top or max(values) * 1.05
    scale = (WIDTH - LEFT - 70) / top
    out, y = [], 58
    for label, bars in groups:
        rows = [(p, bars[p]) for p in names if bars.get(p) is not None]
        height = len(rows) * (BAR + 2)
        out.append('<text x="%d" y="%d" text-anchor="end">%s</text>' % (LEFT - 10, y + height / 2 + 4, escape(label)))
        values = []
        for i, (peer, value) in enumerate(rows):
            x = min(value, top) * scale
            out.append('<rect class="%s" x="%d" y="%d" width="%.1f" height="%d"/>' % (peer, LEFT, y + i * (BAR + 2), max(x, 1), BAR))
            values.append('<text class="faint value" x="%.1f" y="%d">%s</text>' % (LEFT + x + 5, y + i * (BAR + 2) + 11, number(value)))
        if bars.get("target") is not None:
            x = LEFT + bars["target"] * scale
            out.append('<line class="target" x1="%.1f" x2="%.1f" y1="%d" y2="%d"/>' % (x, x, y - 3, y + height + 1))
        # In front of the target's line.
        out += values
        y += height + GAP
    if mark is not None:
        x = LEFT + mark * scale
        out.append('<line class="mark" x1="%.1f" x2="%.1f" y1="50" y2="%d"/>' % (x, x, y - GAP))
    legend, x = [], LEFT
    for peer in [p for p in names if any(bars.get(p) is not None for _, bars in groups)]:
        legend.append('<rect class="%s" x="%d" y="32" width="10" height="10"/><text x="%d" y="41">%s</text>' % (peer, x, x + 15, escape(names[peer])))
        x += 95
    if any(bars.get("target") is not None for _, bars in groups):
        legend.append('<line class="target" x1="%d" x2="%d" y1="31" y2="43"/><text x="%d" y="41">target</text>' % (x + 5, x + 5, x + 15))
    head = '<text class="title" x="10" y="20">%s</text><text class="faint" x="%d" y="20" text-anchor="end">%s</text>' % (escape(title), WIDTH - 10, escape(unit))
    return '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" role="img" aria-label="%s">\n<style>%s</style>\n%s\n%s\n%s\n</svg>\n' % (
        WIDTH, y + 6, escape(title), STYLE, head, "\n".join(legend), "\n".join(out))


def number(x):
    return "%.0f" % x if abs(x) >= 100 else "%.1f" % x if abs(x) >= 10 else "%.2f" % x
