"""Style sheet of an inspection's page, for light and dark themes, wide and narrow windows."""

STYLE = """
:root{--page:#fff;--ink:#1b1f24;--dim:#5b6470;--line:#d8dde3;--panel:#f5f7f9;--bar:#3f6fb5;--bad:#b3261e}
@media (prefers-color-scheme:dark){:root{--page:#14171b;--ink:#e6e9ed;--dim:#9aa4b0;--line:#343b44;--panel:#1d2127;
--bar:#7ea8e6;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0;padding:0 1.5rem 12rem;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
header,main{max-width:78rem;margin:0 auto}
h1{font-size:1.3rem;overflow-wrap:anywhere}
h2{font-size:1.05rem;margin:1.6rem 0 .5rem}
h3,h4{font-size:.95rem;margin:1rem 0 .3rem;overflow-wrap:anywhere}
p{margin:.4rem 0;color:var(--dim)}
table{border-collapse:collapse;font-size:.87rem}
th,td{text-align:left;vertical-align:top;padding:.13rem .8rem .13rem 0;font-weight:normal}
th{color:var(--dim)}
.facts th{white-space:nowrap}
.facts td{overflow-wrap:anywhere}
.numbers{font-variant-numeric:tabular-nums}
.numbers td,.numbers th{text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
.numbers td:first-child,.numbers th:first-child{text-align:left}
.bar{width:9rem}
.bar i{display:block;height:.8rem;margin-top:.25rem;background:var(--bar);min-width:1px}
.wide{overflow-x:auto}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,30rem),1fr));gap:0 3rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,23rem),1fr));gap:1rem 2rem;margin-top:1rem}
figure{margin:0}
figcaption{font-size:.8rem;color:var(--dim)}
svg{width:100%;height:auto;display:block}
svg text{font-size:11px;fill:var(--dim)}
svg rect{fill:var(--bar)}
.grid{stroke:var(--line);fill:none}
.axis{stroke:var(--dim);fill:none}
.median{stroke:var(--ink);stroke-dasharray:3 3;fill:none}
svg .median-label{fill:var(--ink)}
.problems{color:var(--bad);overflow-wrap:anywhere}
input[type=radio]{margin:0 .35rem 0 0}
label{margin-right:1.3rem}
.legend{display:flex;flex-wrap:wrap;align-items:center;margin:.5rem 0;font-size:.8rem}
.legend span{margin-right:.8rem;color:var(--dim)}
.legend i{font-style:normal;text-align:center;min-width:3.1rem;padding:.1rem .3rem;font-variant-numeric:tabular-nums}
#by-e:checked~.legend-o,#by-o:checked~.legend-e{display:none}
article{border-top:1px solid var(--line);margin-top:1rem}
details{font-size:.9rem}
summary{color:var(--dim);cursor:pointer}
.turn{white-space:pre-wrap;overflow-wrap:anywhere;color:var(--ink)}
.turn b{color:var(--dim)}
.images{display:flex;flex-wrap:wrap;gap:.8rem;font-size:.85rem;color:var(--dim)}
.images img{max-width:20rem;max-height:14rem}
.map{margin:.5rem 0;padding:.6rem .8rem;background:var(--panel);border-radius:4px;white-space:pre-wrap;
overflow-wrap:anywhere;font:13.5px/1.75 ui-monospace,"DejaVu Sans Mono",Consolas,monospace}
.t{padding:.12em 0;border-radius:2px;unicode-bidi:isolate;cursor:default;box-decoration-break:clone;
-webkit-box-decoration-break:clone}
.t.id{padding:.12em .3em;margin-right:.25em;display:inline-block}
.t:hover,.t:focus,.t:target{outline:2px solid var(--ink);outline-offset:0}
.pop{display:none;position:fixed;z-index:1;left:50%;bottom:0;transform:translateX(-50%);width:min(46rem,100%);
padding:.7rem 1rem;background:var(--panel);color:var(--ink);border:1px solid var(--line);border-bottom:0;
border-radius:8px 8px 0 0;box-shadow:0 -4px 18px #0005;font-size:.85rem;line-height:1.5;user-select:none}
.t:hover>.pop,.t:focus>.pop,.t:target>.pop{display:block}
.t:hover>.pop{z-index:3}
.t:focus>.pop{z-index:2}
.pop span{display:block;position:relative;padding:.05rem .4rem}
.pop span:first-child{padding:0 0 .3rem}
.pop i{position:absolute;left:0;top:1px;bottom:1px;background:var(--bar);opacity:.35}
.pop u,.pop s{position:relative;text-decoration:none}
.pop s{float:right}
.pop .own u{font-weight:bold}
"""
