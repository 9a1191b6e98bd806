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
side.replaceChildren();side.classList.add('open');el('h2',side,d.name);rows(side,d.facts);for(const[h,l]of[['Parents',d.parents],['Children',d.children]])if(l.length){el('h3',side,h);const t=el('table',side);l.forEach(([r,i])=>{const c=el('tr',t);el('td',c,r);link(el('td',c),i)})}
for(const[h,o]of Object.entries(d.more))if(Object.keys(o).length){el('h3',side,h);rows(side,o)}};
const clear=()=>{side.classList.remove('open');[...nodes,...edges].forEach(e=>e.classList.remove('dim','chosen'))};
nodes.forEach(n=>n.addEventListener('click',e=>{if(moved<6){e.stopPropagation();choose(n.dataset.id)}}));view.addEventListener('click',()=>{if(moved<6)clear()});
box.addEventListener('input',()=>{const q=box.value.trim().toLowerCase();let first=null;nodes.forEach(n=>{const h=q&&data[n.dataset.id].text.includes(q);n.classList.toggle('hit',!!h);n.classList.toggle('dim',!!q&&!h);if(h&&!first)first=n});edges.forEach(e=>e.classList.toggle('dim',!!q));
if(first){const r=first.querySelector('rect');x=view.clientWidth/2-(+r.getAttribute('x')+88)*k;y=view.clientHeight/2-(+r.getAttribute('y')+26)*k;place()}});
document.getElementById('fit').onclick=fit;document.addEventListener('keydown',e=>{if(e.key==='Escape'){box.value='';box.dispatchEvent(new Event('input'));clear()}});window.addEventListener('resize',fit);fit();if(location.hash&&data[location.hash.slice(1)])choose(location.hash.slice(1));
