"""The page's style sheet."""

from __future__ import annotations

from lwd.report.figures import css_colors

LAYOUT = """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 72px 32px 96px; }
h1 { font-size: 40px; line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 12px; font-weight: 680; }
h2 { font-size: 25px; line-height: 1.25; letter-spacing: -0.01em; margin: 0 0 12px; font-weight: 650; }
h3 { font-size: 17px; margin: 36px 0 6px; font-weight: 650; }
h4 { font-size: 15px; margin: 24px 0 4px; font-weight: 650; }
p { max-width: 44em; margin: 0 0 16px; }
section { margin-top: 72px; }
.facts { display: flex; flex-wrap: wrap; gap: 2px 20px; color: var(--muted); font-size: 14px; margin-bottom: 28px; }
.lead { font-size: 18.5px; line-height: 1.55; }
.summary { border-left: 3px solid var(--learned); padding-left: 20px; margin-top: 28px; }
.summary p:last-child { margin-bottom: 0; color: var(--muted); }
.note { color: var(--muted); font-size: 14.5px; }
small { font-weight: normal; }
figure { margin: 0; min-width: 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 24px;
  margin: 20px 0; }
.plots > figure { background: var(--card); border: 1px solid var(--faint); border-radius: 10px; padding: 16px; }
svg { display: block; width: 100%; height: auto; max-width: 620px; margin: 0 auto; }
svg text { font-family: inherit !important; }
img { display: block; width: 100%; height: auto; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 24px; list-style: none; margin: 16px 0 0; padding: 0;
  font-size: 14.5px; }
.swatch { display: inline-block; width: 20px; height: 0; border-top: 4px solid var(--c); vertical-align: middle;
  margin: -2px 10px 0 0; border-radius: 2px; }
.swatch.dashed { border-top-style: dashed; border-top-width: 3px; border-radius: 0; }
.scroll { overflow-x: auto; margin: 20px 0; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; font-variant-numeric: tabular-nums; }
table.narrow { max-width: 620px; }
th, td { padding: 9px 12px; border-bottom: 1px solid var(--faint); vertical-align: bottom; text-align: right; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:last-child, td:last-child { padding-right: 2px; }
thead th { color: var(--muted); font-weight: 500; line-height: 1.35; border-bottom-color: var(--muted); }
tbody th { font-weight: 500; white-space: nowrap; }
td b { font-weight: 700; }
.facts-table th { width: 12em; color: var(--muted); white-space: normal; vertical-align: top; overflow-wrap: anywhere; }
.facts-table td { text-align: left; overflow-wrap: anywhere; }
code { font: 13.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
details { margin: 16px 0; font-size: 14.5px; }
summary { cursor: pointer; color: var(--muted); width: fit-content; }
summary:hover { color: var(--ink); }
details > p { margin-top: 10px; color: var(--muted); }
.grids { gap: 24px; }
.grids figcaption { font-weight: 600; font-size: 15px; margin-bottom: 10px; }
.grid { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 12px; }
.names { display: grid; grid-template-rows: repeat(var(--rows), minmax(0, 1fr)); font-size: 13px; line-height: 1;
  color: var(--muted); align-items: center; text-align: right; }
.trajectory { table-layout: fixed; margin-top: 20px; }
.trajectory th, .trajectory td { border: 0; padding: 3px; text-align: center; font-size: 14px; color: var(--muted);
  font-weight: 500; }
.trajectory td { vertical-align: top; }
.trajectory .strip th { text-align: left; padding: 20px 3px 4px; color: var(--ink); font-weight: 600; }
.trajectory thead .strip th { padding-top: 0; }
.trajectory img { border-radius: 3px; margin-bottom: 4px; }
.trajectory small { color: var(--muted); font-size: 13px; }
@media (max-width: 600px) {
  main { padding: 36px 16px 56px; }
  h1 { font-size: 31px; }
  h2 { font-size: 22px; }
  section { margin-top: 52px; }
  .lead { font-size: 17px; }
  .summary { padding-left: 14px; }
  .plots { gap: 16px; }
  .plots > figure { padding: 10px; }
  .grid { gap: 8px; }
  .names { font-size: 11.5px; }
  th, td { padding: 8px 9px; }
  .facts-table th { width: 8em; }
  .trajectory th, .trajectory td { font-size: 12px; padding: 2px; }
}
@media print {
  body { background: none; font-size: 11pt; }
  main { max-width: none; padding: 0; }
  section { margin-top: 28pt; }
  figure, tr, .summary { break-inside: avoid; }
  h2, h3, h4, .legend { break-after: avoid; }
  .plots { grid-template-columns: 1fr 1fr; gap: 12pt; }
  .plots > figure { border-color: #ccc; padding: 8pt; }
  .names { font-size: 7.5pt; }
  .scroll { overflow: visible; }
  table { font-size: 9pt; }
  th, td { padding: 4pt 6pt; }
  details::details-content { content-visibility: visible; block-size: auto; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""


def stylesheet() -> str:
    """Colours of both themes, then the layout; paper is always light."""
    light = _variables({"page": "#fbfbfa", **css_colors(0)})
    dark = _variables({"page": "#12151a", **css_colors(1)})
    return (
        f":root {{ color-scheme: light dark; {light} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}" + LAYOUT
    )


def _variables(colors: dict[str, str]) -> str:
    return " ".join(f"--{name}: {color};" for name, color in colors.items())
