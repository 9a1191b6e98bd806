(s => { const f = s.previousElementSibling, all = [...s.nextElementSibling.children], on = new Set(), words = f.querySelector("input");
const show = () => { const q = words.value.toLowerCase(); all.forEach(d => { const tags = (d.dataset.tags || "").split("\n");
d.hidden = [...on].some(t => !tags.includes(t)) || !!q && !d.textContent.toLowerCase().includes(q); }); };
f.querySelectorAll("button").forEach(b => b.onclick = () => { const t = b.dataset.tag; on.has(t) ? on.delete(t) : on.add(t); b.classList.toggle("on"); show(); });
words.oninput = show; })(document.currentScript)
