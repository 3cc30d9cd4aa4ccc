"""How the page of a run looks: by day, by night, on a phone, on paper."""

from __future__ import annotations

# The page may load nothing and run nothing: even a text that slipped through the escaping could do no harm.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

STYLE = """
:root { color-scheme: light dark;
  --paper: #f6f7f9; --card: #ffffff; --ink: #0f172a; --quiet: #566378; --rule: #e2e6ec; --soft: #eef1f5;
  --a: #2563eb; --b: #c2410c; --c: #0f766e; --d: #7c3aed; --p: #8a94a6; --good: #15803d; --fair: #a16207; --bad: #b91c1c }
@media (prefers-color-scheme: dark) { :root {
  --paper: #0d1117; --card: #161b23; --ink: #e6eaf0; --quiet: #94a1b5; --rule: #2a323e; --soft: #1e2530;
  --a: #6ea8fe; --b: #fb9a5e; --c: #4fd1c0; --d: #b39dfa; --p: #77839a; --good: #4ade80; --fair: #facc15; --bad: #f87171 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', Roboto,
  'DejaVu Sans', sans-serif; -webkit-text-size-adjust: 100% }
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 60px }
h1 { font-size: 26px; line-height: 1.25; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 18px; margin: 40px 0 12px }
h3 { font-size: 14px; margin: 0 0 6px; font-weight: 600 }
p { margin: 6px 0; max-width: 84ch; overflow-wrap: anywhere } .quiet, figcaption, footer { color: var(--quiet); font-size: 13px }
code, td.v, .path { font: 13px/1.45 ui-monospace, SFMono-Regular, Menlo, 'DejaVu Sans Mono', monospace; overflow-wrap: anywhere }
pre { font: 12px/1.45 ui-monospace, SFMono-Regular, Menlo, 'DejaVu Sans Mono', monospace; margin: 8px 0 }
.top { display: flex; flex-wrap: wrap; gap: 8px 14px; align-items: center }
.badge { font-weight: 600; font-size: 13px; padding: 2px 12px; border-radius: 99px; border: 1.5px solid; white-space: nowrap }
.good { color: var(--good) } .fair { color: var(--fair) } .bad { color: var(--bad) }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(138px, 1fr)); gap: 10px; margin: 20px 0 }
.card, figure, .panel { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 12px 14px; margin: 0; min-width: 0 }
.card b { display: block; font-size: 18px; line-height: 1.4; font-weight: 650; white-space: nowrap;
  font-variant-numeric: tabular-nums }
.card span { color: var(--quiet); font-size: 12.5px; display: block }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 370px), 1fr)); gap: 12px; margin-top: 12px }
.rows { display: grid; gap: 12px; grid-template-columns: minmax(0, 1fr) }
@media (min-width: 900px) { .grid.pair { grid-template-columns: 1fr 1fr } }
svg { display: block; width: 100%; height: auto; font-size: 11px; font-variant-numeric: tabular-nums } .narrow { display: none }
svg text { fill: var(--ink) } svg .tick { fill: var(--quiet) } svg .grid { stroke: var(--rule); stroke-width: 1 }
svg .axis { stroke: var(--p); stroke-width: 1 } svg .band { fill: var(--bad); fill-opacity: .13 }
svg .mark { stroke: var(--bad); stroke-width: 1; stroke-dasharray: 3 3; stroke-opacity: .75 } svg .flag { fill: var(--bad) }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round }
svg .line.pale { stroke-width: 1; stroke-opacity: .35 }
svg .area { fill-opacity: .16; stroke: none } svg .line.p { stroke-dasharray: 5 3 }
svg .line.a { stroke: var(--a) } svg .line.b { stroke: var(--b) } svg .line.c { stroke: var(--c) }
svg .line.d { stroke: var(--d) } svg .line.p { stroke: var(--p) }
svg .dot.a, svg .area.a { fill: var(--a) } svg .dot.b, svg .area.b { fill: var(--b) } svg .dot.c, svg .area.c { fill: var(--c) }
svg .dot.d, svg .area.d { fill: var(--d) } svg .dot.p, svg .area.p { fill: var(--p) }
svg .over { fill: var(--b) } svg .under { fill: var(--a) } svg .cell { stroke: var(--card); stroke-width: .5 }
svg .hit { fill: transparent } svg .tip { visibility: hidden; pointer-events: none } svg .at:hover .tip { visibility: visible }
svg .tip line { stroke: var(--quiet) } svg .tip rect { fill: var(--card); stroke: var(--rule) }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 13px; color: var(--quiet); margin: 2px 0 6px }
.legend i, .bar i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px;
  vertical-align: -1px }
.bar { display: flex; height: 26px; border-radius: 6px; overflow: hidden; background: var(--soft); margin: 4px 0 8px }
.bar i { height: 100%; width: auto; margin: 0; border-radius: 0; min-width: 1px }
i.a { background: var(--a) } i.b { background: var(--b) } i.c { background: var(--c) } i.d { background: var(--d) }
i.p { background: var(--p) } i.bad { background: var(--bad) }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--rule); vertical-align: top }
th { color: var(--quiet); font-weight: 500; white-space: nowrap } tr:last-child td { border-bottom: 0 }
td.n, th.n { text-align: right }
td.t { white-space: nowrap } td.wide { min-width: 18em; overflow-wrap: anywhere }
.ranks { display: grid; grid-template-columns: auto 1fr auto; gap: 5px 12px; align-items: center; font-size: 13px }
.ranks .track { position: relative; height: 16px; background: var(--soft); border-radius: 4px; overflow: hidden }
.ranks .track i { position: absolute; inset: 0 auto 0 0; background: var(--a); opacity: .75 }
.ranks .track u { position: absolute; top: 0; bottom: 0; width: 3px; background: var(--b) }
details { border-top: 1px solid var(--rule); padding: 8px 0 } details:first-of-type { border-top: 0 }
summary { cursor: pointer; font-weight: 600 } summary span { color: var(--quiet); font-weight: 400 }
footer { margin-top: 44px; border-top: 1px solid var(--rule); padding-top: 12px }
@media (max-width: 760px) { main { padding: 18px 12px 40px } h1 { font-size: 22px }
  div.wide { display: none } .narrow { display: block } td.wide { min-width: 14em }
  .cards { grid-template-columns: repeat(2, 1fr) } }
@media print { .panel, figure, .card { break-inside: avoid } body { background: #fff } }
"""
