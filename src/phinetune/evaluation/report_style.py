"""How the report looks: one style sheet, colours by name in light and in dark, tables that become cards on a phone."""

STYLE = """\
:root { --ink: #1d2430; --soft: #5b6472; --line: #d8dde4; --paper: #ffffff; --card: #f5f7f9; --mark: #0b62a8; --band: #a9cdec; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --soft: #9aa4b2; --line: #343c48; --paper: #14181e; --card: #1c222a; --mark: #7cc0ff; --band: #24507a; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { max-width: 46rem; margin: .5rem 0; }
small, li, dt { color: var(--soft); }
ul { margin: .75rem 0; padding-left: 1.2rem; font-size: .85rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .45rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child { padding-left: 0; }
th:first-child, .text th, .text td { text-align: left; }
.numbers td, .numbers tbody th { white-space: nowrap; }
.numbers small { display: block; }
.text td:first-child { width: 1%; white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
.bars { max-width: 46rem; margin: 1rem 0; }
.bar { display: grid; grid-template-columns: 9rem 1fr 4rem; gap: .75rem; align-items: center; padding: .1rem 0; }
.bar .name { overflow-wrap: anywhere; }
.bar .number { text-align: right; font-variant-numeric: tabular-nums; }
.bar svg { display: block; overflow: visible; }
.axis { display: flex; justify-content: space-between; color: var(--soft); font-size: .8rem; }
.track { stroke: var(--line); }
.mean { stroke: var(--soft); stroke-dasharray: 3 3; }
.interval { fill: var(--band); }
.value { fill: var(--mark); }
details { margin: .4rem 0; background: var(--card); border-radius: 6px; padding: .5rem .8rem; }
summary { cursor: pointer; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.45 ui-monospace, monospace; }
.command { background: var(--card); border-radius: 6px; padding: .7rem .8rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; font-size: .9rem; }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 46rem) {
  .bar { grid-template-columns: 1fr 4rem; }
  .bar .name { grid-column: 1 / -1; margin-bottom: -.4rem; }
  .bar.ends .name { display: none; }
  table, tbody, tr, td, tbody th { display: block; width: 100%; }
  thead { display: none; }
  tr { background: var(--card); border-radius: 6px; padding: .5rem .8rem; margin: .6rem 0; }
  details tr { background: var(--paper); }
  td { display: flex; gap: 1rem; justify-content: space-between; border: 0; padding: .15rem 0; text-align: right; }
  .text td { text-align: left; display: block; }
  .text td::before { display: block; }
  .numbers small { display: inline; }
  td::before { content: attr(data-label); color: var(--soft); text-align: left; flex: none; }
  tbody th, .text th { border: 0; padding: 0 0 .2rem; text-align: left; font-size: 1.05rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; }
}
"""
