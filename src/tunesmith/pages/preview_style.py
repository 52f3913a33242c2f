"""CSS and JavaScript of the preview page."""

STYLE = """
header form{display:flex;flex-wrap:wrap;gap:.5rem 1.5rem;align-items:end;position:sticky;top:0;
background:var(--page);padding:.5rem 0;z-index:1}
header{display:contents}
input[type=search]{font:inherit;min-width:22rem;max-width:100%;padding:.3rem .5rem;
border:1px solid var(--line);border-radius:4px;background:var(--panel);color:inherit}
fieldset{border:0;padding:0;margin:0;display:flex;gap:1rem}
#rows{list-style:none;padding:0;margin:1rem 0}
#rows>li{border-top:1px solid var(--line);content-visibility:auto;
contain-intrinsic-size:auto 2.2rem}
summary{cursor:pointer;padding:.3rem 0}
summary b{font-weight:600}
.status{display:inline-block;min-width:5.5rem;color:var(--faint)}
.truncated .status,.dropped .status,.refused .status{color:var(--bad);font-weight:600}
.both{display:grid;grid-template-columns:minmax(0,3fr) minmax(0,2fr);gap:1rem}
@media (max-width:60rem){.both{grid-template-columns:minmax(0,1fr)}}
pre,.tokens{font:13px/1.7 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere;
margin:0 0 .5rem}
pre{background:var(--panel);padding:.5rem;border-radius:4px;max-height:40rem;overflow:auto;
line-height:1.5}
.tree,.tree ul{list-style:none;margin:0;padding:0}
.tree ul{padding-left:.7rem;border-left:2px solid var(--line)}
.edge{color:var(--mark);font-size:.85rem}
.tokens i,.tokens b{font-style:normal;font-weight:400;border-right:1px dotted var(--line)}
.tokens i{color:var(--faint)}
.tokens b{background:rgb(var(--learn)/.38);border-radius:2px}
.tokens .w1{background:rgb(var(--learn)/.10)}
.tokens .w2{background:rgb(var(--learn)/.18)}
.tokens .w3{background:rgb(var(--learn)/.28)}
.tokens .w5{background:rgb(var(--heavy)/.42)}
.tokens .at{outline:2px solid var(--mark)}
body{padding-bottom:3rem}
.tokens .sp{text-decoration:underline dotted}
.tokens s{text-decoration:none;opacity:.5}
.tokens b[data-weight]::before{content:"×" attr(data-weight) " ";font-size:.7em;opacity:.8}
.turn{display:inline-block;font:600 .75rem/1.4 system-ui,sans-serif;color:var(--mark);
border:1px solid var(--line);border-radius:3px;padding:0 .3rem;margin:0 .3rem 0 0}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;align-items:baseline;margin:.5rem 0}
.legend .tokens{margin:0}
.reason{color:var(--bad)}
#token{position:fixed;bottom:0;left:0;right:0;background:var(--panel);padding:.2rem 1rem;
border-top:1px solid var(--line);font:13px ui-monospace,monospace;min-height:1.9rem}
[hidden]{display:none}
"""

SCRIPT = """
'use strict';
(function () {
  const rows = Array.from(document.querySelectorAll('#rows > li'));
  const box = document.getElementById('find');
  const count = document.getElementById('shown');
  const ticks = Array.from(document.querySelectorAll('fieldset input'));
  const texts = new Map();
  function textOf(row) {
    if (!texts.has(row)) texts.set(row, row.textContent.toLowerCase());
    return texts.get(row);
  }
  function matches(row, asked) {
    if (asked === '') return true;
    if (/^\\d+$/.test(asked)) return row.dataset.row === String(Number(asked));
    const name = row.dataset.source + ':' + row.dataset.row;
    return name.endsWith(asked) || textOf(row).includes(asked.toLowerCase());
  }
  function filter() {
    const asked = box.value.trim();
    const wanted = new Set(ticks.filter((tick) => tick.checked).map((tick) => tick.value));
    let shown = 0;
    for (const row of rows) {
      const seen = wanted.has(row.dataset.status) && matches(row, asked);
      row.hidden = !seen;
      shown += seen;
    }
    count.textContent = shown + ' of ' + rows.length + ' rows';
    return rows.filter((row) => !row.hidden);
  }
  let waiting = 0;
  box.addEventListener('input', function () {
    clearTimeout(waiting);
    waiting = setTimeout(filter, 150);
  });
  for (const tick of ticks) tick.addEventListener('change', filter);
  document.getElementById('search').addEventListener('submit', function (event) {
    event.preventDefault();
    const found = filter()[0];
    if (!found) return;
    const details = found.querySelector('details');
    details.open = true;
    details.querySelector('summary').focus();
    found.scrollIntoView({block: 'start'});
  });
  document.addEventListener('keydown', function (event) {
    if (event.key === '/' && document.activeElement !== box) {
      event.preventDefault();
      box.focus();
      box.select();
    }
  });
  const line = document.getElementById('token');
  function cellsOf(home) {
    return Array.from(home.children).filter((item) => item.tagName !== 'SPAN');
  }
  function tell(home, number) {
    const cell = cellsOf(home)[number];
    const sizes = home.dataset.sizes ? home.dataset.sizes.split(' ').map(Number) : null;
    const first = sizes ? sizes.slice(0, number).reduce((a, b) => a + b, 0) : number;
    const ids = home.dataset.ids.split(' ').slice(first, first + (sizes ? sizes[number] : 1));
    const learned = cell.tagName === 'B';
    const weight = learned ? 'learned, weight ' + (cell.dataset.weight || '1') : 'context';
    const shown = cell.textContent === ' ' ? 'space' : cell.textContent;
    line.textContent =
      'token ' + first + ' of its segment: ' + shown + ' (id ' + ids.join(' ') + '), ' + weight;
  }
  document.addEventListener('mouseover', function (event) {
    const cell = event.target.closest && event.target.closest('.tokens > i, .tokens > b');
    if (cell && cell.parentNode.dataset.ids) {
      tell(cell.parentNode, cellsOf(cell.parentNode).indexOf(cell));
    }
  });
  document.addEventListener('keydown', function (event) {
    const home = document.activeElement;
    const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    if (!step || !home || !home.dataset || !home.dataset.ids) return;
    event.preventDefault();
    const cells = cellsOf(home);
    const old = cells.findIndex((cell) => cell.classList.contains('at'));
    const number = Math.min(Math.max(old + step, 0), cells.length - 1);
    if (old >= 0) cells[old].classList.remove('at');
    cells[number].classList.add('at');
    tell(home, number);
  });
  function openTarget() {
    const row = location.hash && document.getElementById(location.hash.slice(1));
    if (row && row.firstElementChild) row.firstElementChild.open = true;
  }
  window.addEventListener('hashchange', openTarget);
  document.getElementById('search').hidden = false;
  filter();
  openTarget();
})();
"""
