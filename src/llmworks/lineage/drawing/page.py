"""A family as one page that needs nothing from outside: drag and zoom, search, a click shows what is known of an artifact. Knows only `family.Family` and its drawing."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmworks.lineage.drawing.formats import COLORS, draw_svg
from llmworks.lineage.family import Family, Node

STYLE = """
*{box-sizing:border-box}body{margin:0;font:14px/1.45 system-ui,sans-serif;color:#0f172a;background:#f8fafc;height:100vh;display:flex;flex-direction:column}
header{padding:10px 16px;background:#fff;border-bottom:1px solid #e2e8f0;display:flex;gap:14px;align-items:center;flex-wrap:wrap}h1{font-size:17px;margin:0}
header p{margin:0;color:#475569}input{font:inherit;padding:5px 9px;border:1px solid #cbd5e1;border-radius:6px;width:230px}button{font:inherit;padding:4px 10px;border:1px solid #cbd5e1;border-radius:6px;background:#fff;cursor:pointer}
main{flex:1;display:flex;min-height:0}#view{flex:1;overflow:hidden;cursor:grab;position:relative;touch-action:none}#view:active{cursor:grabbing}#view svg{position:absolute;left:0;top:0;transform-origin:0 0;overflow:visible}
aside{width:390px;max-width:45vw;overflow:auto;background:#fff;border-left:1px solid #e2e8f0;padding:14px 16px;display:none}aside.open{display:block}aside h2{font-size:15px;margin:0 0 8px;overflow-wrap:anywhere}
aside table{border-collapse:collapse;width:100%;font-size:12.5px}aside td{padding:3px 6px 3px 0;vertical-align:top;border-top:1px solid #f1f5f9;overflow-wrap:anywhere}aside td:first-child{color:#64748b;white-space:nowrap;width:1%}aside h3{font-size:12.5px;margin:14px 0 4px;color:#475569}
aside a{color:#2563eb;cursor:pointer}.node{cursor:pointer}.dim{opacity:.13}.node.hit rect{fill:#fef9c3}.node.chosen rect{stroke-width:3.4}.warn{color:#b45309;margin:0;padding:8px 16px;background:#fffbeb;border-bottom:1px solid #fde68a;max-height:96px;overflow:auto}.warn div{margin:2px 0}
.key{display:flex;gap:10px;font-size:12px;color:#475569;flex-wrap:wrap}.key i{display:inline-block;width:10px;height:10px;border:2px solid;border-radius:3px;margin-right:4px}
"""
SCRIPT = """
const data=JSON.parse(document.getElementById('data').textContent),view=document.getElementById('view'),svg=view.querySelector('svg'),side=document.querySelector('aside'),box=document.querySelector('input');
let x=0,y=0,k=1;const place=()=>svg.style.transform=`translate(${x}px,${y}px) scale(${k})`;
const fit=()=>{const w=+svg.getAttribute('width'),h=+svg.getAttribute('height');k=Math.min(1.4,view.clientWidth/w,view.clientHeight/h)*.97;x=(view.clientWidth-w*k)/2;y=Math.max(8,(view.clientHeight-h*k)/2);place()};
const zoom=(f,cx,cy)=>{const n=Math.min(6,Math.max(.05,k*f));x=cx-(cx-x)*n/k;y=cy-(cy-y)*n/k;k=n;place()};
view.addEventListener('wheel',e=>{e.preventDefault();const r=view.getBoundingClientRect();zoom(Math.exp(-e.deltaY*.0015),e.clientX-r.left,e.clientY-r.top)},{passive:false});
let down=null,moved=0;view.addEventListener('pointerdown',e=>{down=[e.clientX-x,e.clientY-y];moved=0});window.addEventListener('pointermove',e=>{if(down){moved+=Math.abs(e.movementX)+Math.abs(e.movementY);x=e.clientX-down[0];y=e.clientY-down[1];place()}});window.addEventListener('pointerup',()=>down=null);
const nodes=[...svg.querySelectorAll('.node')],edges=[...svg.querySelectorAll('.edge')];
const kin=(id,up)=>{const s=new Set,t=[id];while(t.length){const c=t.pop();if(s.has(c))continue;s.add(c);edges.forEach(e=>{const[a,b]=up?[e.dataset.to,e.dataset.from]:[e.dataset.from,e.dataset.to];if(a===c)t.push(b)})}return s};
const el=(t,p,x)=>{const e=document.createElement(t);if(x!==undefined)e.textContent=x;p.append(e);return e};
const link=(p,id)=>{const a=el('a',p,data[id]?data[id].name:id);a.onclick=()=>choose(id);return a};
const rows=(p,o)=>{const t=el('table',p);for(const[a,b]of Object.entries(o)){const r=el('tr',t);el('td',r,a);el('td',r,typeof b==='object'?JSON.stringify(b):String(b))}};
const choose=id=>{const d=data[id],all=new Set([...kin(id,true),...kin(id,false)]);nodes.forEach(n=>{n.classList.toggle('chosen',n.dataset.id===id);n.classList.toggle('dim',!all.has(n.dataset.id))});edges.forEach(e=>e.classList.toggle('dim',!(all.has(e.dataset.from)&&all.has(e.dataset.to))));
side.replaceChildren();side.classList.add('open');el('h2',side,d.name);rows(side,d.facts);for(const[h,l]of[['Made from',d.parents],['What was made of it',d.children]])if(l.length){el('h3',side,h);const t=el('table',side);l.forEach(([r,i])=>{const c=el('tr',t);el('td',c,r);link(el('td',c),i)})}
for(const[h,o]of Object.entries(d.more))if(Object.keys(o).length){el('h3',side,h);rows(side,o)}};
const clear=()=>{side.classList.remove('open');[...nodes,...edges].forEach(e=>e.classList.remove('dim','chosen'))};
nodes.forEach(n=>n.addEventListener('click',e=>{if(moved<6){e.stopPropagation();choose(n.dataset.id)}}));view.addEventListener('click',()=>{if(moved<6)clear()});
box.addEventListener('input',()=>{const q=box.value.trim().toLowerCase();let first=null;nodes.forEach(n=>{const h=q&&data[n.dataset.id].text.includes(q);n.classList.toggle('hit',!!h);n.classList.toggle('dim',!!q&&!h);if(h&&!first)first=n});edges.forEach(e=>e.classList.toggle('dim',!!q));
if(first){const r=first.querySelector('rect');x=view.clientWidth/2-(+r.getAttribute('x')+88)*k;y=view.clientHeight/2-(+r.getAttribute('y')+26)*k;place()}});
document.getElementById('fit').onclick=fit;document.addEventListener('keydown',e=>{if(e.key==='Escape'){box.value='';box.dispatchEvent(new Event('input'));clear()}});window.addEventListener('resize',fit);fit();if(location.hash&&data[location.hash.slice(1)])choose(location.hash.slice(1));
"""


def draw_page(family: Family, title: str, licences: Mapping[str, str], warnings: Sequence[str]) -> str:
    """The page. `licences`: by digest; `warnings`: lines above the drawing."""
    data = {digest: _known(family, node, licences) for digest, node in family.nodes.items()}
    kinds = [kind for kind in COLORS if any(node.kind == kind for node in family.nodes.values())]
    key = "".join(f'<span><i style="border-color:{COLORS[kind]}"></i>{kind}</span>' for kind in kinds) + "<span>solid: can be derived again; dashed: declared; dotted: claimed by a file, or told by weights</span>"
    warned = f'<div class="warn">{"".join(f"<div>{html.escape(line)}</div>" for line in warnings)}</div>' if warnings else ""
    script = json.dumps(data, ensure_ascii=False, sort_keys=True).replace("<", "\\u003c")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><title>{html.escape(title)}</title><style>{STYLE}</style></head><body>'
        f'<header><h1>{html.escape(title)}</h1><p>{len(family.nodes)} artifacts</p><input type="search" placeholder="search names, stages, digests" aria-label="search"><button id="fit">all of it</button><div class="key">{key}</div></header>{warned}'
        f'<main><div id="view">{draw_svg(family)}</div><aside></aside></main><script type="application/json" id="data">{script}</script><script>{SCRIPT}</script></body></html>\n'
    )


def _known(family: Family, node: Node, licences: Mapping[str, str]) -> dict[str, Any]:
    """What the page shows of a node, and what its search looks through."""
    manifest = node.artifact.manifest if node.artifact is not None else None
    facts: dict[str, Any] = {"kind": node.kind, "digest": node.digest, "made by": node.stage or "from outside", **({"reference": node.ref} if node.ref else {}), **({"licence": licences[node.digest]} if node.digest in licences else {})}
    more: dict[str, Any] = {}
    if manifest is not None:
        if manifest.stage:
            facts |= {"derivation": manifest.derivation, "when": f"{manifest.started} to {manifest.finished[:19]}", "seed": manifest.seed, "threads": manifest.threads}
        more = {"Metrics": manifest.metrics, "About": manifest.about, "Config": {name: value for name, value in manifest.config.items() if value not in (None, {}, [])}, "Files": {name: f"{entry.bytes:,} bytes, {entry.sha256[:12]}" for name, entry in list(manifest.files.items())[:60]}}
    children = [(role, child.digest) for role, child in family.children(node.digest)]
    text = " ".join([node.label, node.stage, node.ref, node.kind, node.digest, licences.get(node.digest, "")]).lower()
    return {"name": node.label, "facts": facts, "parents": [one for one in node.parents if one[1] in family.nodes], "children": children, "more": more, "text": text}
