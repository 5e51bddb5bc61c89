"""The page's style sheet: no fonts or files from elsewhere, light and dark, wide and narrow."""

STYLE = """
:root { color-scheme: light dark;
  --bg: #ffffff; --panel: #f6f7f9; --ink: #16191d; --muted: #5c6570; --line: #d9dde3;
  --neg: 178 24 43; --pos: 33 102 172; --strong: #ffffff;
  --error: #b2182b; --mark: #ffe58a; --mark-ink: #16191d; --one: #0b7a75; --two: #b45f06;
  --three: #6b3fa0; --four: #1668b8; --five: #b0246b; --six: #5c6b12; }
@media (prefers-color-scheme: dark) { :root {
  --bg: #14171b; --panel: #1d2127; --ink: #e8eaed; --muted: #a0a8b3; --line: #363c45;
  --neg: 255 112 92; --pos: 92 165 255; --strong: #0d0f12;
  --error: #ff8573; --mark: #ffd84d; --one: #45c4bc; --two: #f0a04b;
  --three: #b99bf0; --four: #6db3ff; --five: #f58ac0; --six: #c2d15c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 1.25rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; }
h1 small { font-size: .68em; font-weight: normal; display: block; }
h2 { font-size: 1.3rem; margin: 2rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
article h3, figure h3 { margin-top: 0; }
p { margin: .3rem 0 .7rem; max-width: 95ch; }
small { font-size: .8em; }
.lead, .missing, figcaption, dt { color: var(--muted); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; font-weight: normal; }
thead th { color: var(--muted); font-weight: normal; }
td i { color: var(--muted); font-style: normal; font-size: .85em; white-space: nowrap; }
.scroll { overflow-x: auto; }
.columns { display: grid; grid-template-columns: minmax(0, 7fr) minmax(0, 5fr); gap: .5rem 2.5rem;
  align-items: start; }
dl { display: grid; grid-template-columns: auto 1fr; gap: .15rem 1rem; margin: 0; }
dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
article { background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem 1rem 1rem; margin: 1rem 0; }
article h3 { font-size: 1.1rem; }
article h3 code { font-size: 1.1em; }
.about { color: var(--muted); font-size: .9em; }
code, .heat, pre, q {
  font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
q { quotes: none; padding: 0 .25em; border-radius: 3px; overflow-wrap: anywhere; }
q.bad { box-shadow: inset 0 -2px var(--error); }
q.good { background: var(--mark); color: var(--mark-ink); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem .8rem; font-size: .9rem; margin: .4rem 0; }
.scale { display: grid; grid-template-columns: repeat(5, 3.2rem); text-align: center;
  line-height: 1.2; white-space: nowrap; }
.scale i { grid-column: 1 / -1; height: 1rem; border-radius: 3px; margin: 0 1.6rem;
  background: linear-gradient(90deg, rgb(var(--neg)), rgb(var(--neg) / 0), rgb(var(--pos) / 0),
    rgb(var(--pos))); }
.heat { margin-top: .5rem; }
.row { display: grid; grid-template-columns: 6.2rem minmax(0, 27fr) minmax(0, 23fr); gap: 0 .8rem;
  align-items: center; padding: .18rem .5rem; border: 2px solid transparent; border-radius: 6px; }
.row.head { font-family: system-ui, sans-serif; font-size: .85rem; color: var(--muted); }
.row.wrong { border-color: var(--error); background: var(--bg); }
.flag { background: var(--error); color: var(--bg); border-radius: 4px; padding: .1rem .45rem;
  font: bold .85rem system-ui, sans-serif; white-space: nowrap; }
.note { color: var(--muted); font: .85rem system-ui, sans-serif; }
.t { display: inline-block; vertical-align: top; min-width: 1.1em; min-height: 1.65em;
  text-align: center; padding: .05em .25em; margin: 1px 0 1px 5px; border-radius: 3px; cursor: help;
  box-shadow: inset 0 0 0 1px var(--line); }
.t.glued { margin-left: 1px; }
.t.neg { background: rgb(var(--neg) / var(--a)); }
.t.pos { background: rgb(var(--pos) / var(--a)); }
.t.strong { color: var(--strong); font-weight: bold; }
.t small { display: block; font-size: .68em; line-height: 1.1; }
.critique { border-left: 3px solid var(--line); padding: .1rem 0 .1rem .7rem; }
.critique em { font: .78rem system-ui, sans-serif; color: var(--muted); margin-left: .7em;
  white-space: nowrap; }
.copied { color: var(--muted); }
.rewritten { border-left-color: var(--mark); }
.rewritten em { color: inherit; font-weight: bold; }
mark { background: var(--mark); color: var(--mark-ink); border-radius: 3px; padding: 0 .2em; }
details { margin-top: .6rem; }
summary { cursor: pointer; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr));
  gap: 1rem 1.5rem; }
.charts.pairs { margin-top: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
figure { margin: 0; }
figcaption { font-size: .85rem; min-height: 1.4em; }
.key { margin-right: 1rem; white-space: nowrap; }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 50%;
  margin-right: .35em; }
.one { --colour: var(--one); } .two { --colour: var(--two); } .three { --colour: var(--three); }
.four { --colour: var(--four); } .five { --colour: var(--five); } .six { --colour: var(--six); }
.key i, .bar-row i { background: var(--colour); }
svg { width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--muted); }
svg .x { text-anchor: middle; }
svg .y { text-anchor: end; }
svg .grid { stroke: var(--line); }
svg g { stroke: var(--colour); fill: var(--colour); }
svg .thin { opacity: .6; }
svg .thin polyline { stroke-width: 1; }
svg polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .bar { stroke-width: 2; }
.bar-row { display: grid; grid-template-columns: 15rem 1fr 11rem; gap: .8rem; align-items: center;
  font-size: .92rem; font-variant-numeric: tabular-nums; margin: .15rem 0; }
.track { background: var(--panel); border-radius: 3px; height: 1rem; }
.track i { display: block; height: 100%; border-radius: 3px; }
.range { position: relative; }
.range i { position: absolute; height: .5rem; top: .25rem; opacity: .6; }
.range u { position: absolute; height: 100%; border-left: 1px solid var(--muted); }
.range b { position: absolute; height: 100%; border-left: 3px solid var(--ink); margin-left: -1px; }
.strip { display: flex; height: 1.5rem; box-shadow: inset 0 0 0 1px var(--line); }
.strip i { flex: 1; cursor: help; }
.strip .neg { background: rgb(var(--neg) / var(--a)); }
.strip .pos { background: rgb(var(--pos) / var(--a)); }
.strip .mark { border-left: 2px solid var(--ink); }
h4 { margin: .8rem 0 .2rem; }
.switch > input { margin: 0 .3rem .8rem 1rem; }
#axis-steps:checked ~ .by-rollouts, #axis-rollouts:checked ~ .by-steps { display: none; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 6px;
  padding: .7rem 1rem; overflow-x: auto; font-size: .85rem; line-height: 1.4; }
@media (max-width: 800px) {
  main { padding: 1rem .75rem 3rem; }
  h1 { font-size: 1.35rem; }
  .columns { grid-template-columns: minmax(0, 1fr); gap: 1rem; }
  th, td { padding-right: .5rem; font-size: .9rem; }
  td i { display: block; }
  article { padding: .6rem; }
  .scale { grid-template-columns: repeat(5, 2.7rem); }
  .scale i { margin: 0 1.35rem; }
  .row { grid-template-columns: minmax(0, 1fr); padding: .2rem .35rem .35rem; }
  .row.head span:first-child, .note { display: none; }
  .t { margin-left: 2px; padding: .05em .18em; font-size: .92em; }
  .critique { margin-top: .2rem; font-size: .92em; }
  .bar-row { grid-template-columns: 1fr auto; gap: 0 .6rem; }
  .bar-row .track, .bar-row .strip { grid-column: 1 / -1; grid-row: 2; }
}
"""
