// The comparison of two encoders as a page of its own. It draws what stands in the page and asks nothing of the network. Titles are put in as text, never as HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const SIGNS = { won: "▲", lost: "▼", moved: "◆", same: "=" }, KINDS = Object.keys(SIGNS), LETTERS = ["a", "b"];
const SORTS = {
  disagreement: ["most changed first", () => 0],
  better: ["B better first", (one, other) => other.change - one.change],
  worse: ["B worse first", (one, other) => one.change - other.change],
  a: ["rank of A, best first", (one, other) => one.a - other.a],
  b: ["rank of B, best first", (one, other) => one.b - other.b],
  category: ["category", (one, other) => pathOf(one.path).localeCompare(pathOf(other.path), "en")],
};
const PLAIN = { direction: "", category: "", kind: "", sort: "disagreement", text: "", query: "" }, STEP = 20, FEW = 12;

const counted = (count) => count.toLocaleString("en");
const several = (count, one, many = `${one}s`) => `${counted(count)} ${count === 1 ? one : many}`;
const pathOf = (place) => (place === null ? "" : data.paths[place].join(" > "));
const within = (path, category) => !category || path === category || path.startsWith(`${category} > `);
const keyOf = (row) => `${data.directions[row.d][0]} ${row.id}`;
const letterName = (letter) => letter.toUpperCase();
const nameOf = (letter) => data.names[LETTERS.indexOf(letter)];
const foreign = (text) => make("bdi", {}, text);

// What is chosen, and the same as the part of the address behind #.
const view = { ...PLAIN };
let unknown = [];

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  Object.assign(view, PLAIN);
  for (const [name, value] of given) if (name in view) view[name] = value;
  const known = {
    direction: data.directions.some(([name]) => name === view.direction), category: data.paths.some((_, place) => within(pathOf(place), view.category)), kind: KINDS.includes(view.kind),
    sort: view.sort in SORTS, query: data.rows.some((row) => keyOf(row) === view.query),
  };
  unknown = Object.keys(known).filter((name) => view[name] !== PLAIN[name] && !known[name]);
  const lost = unknown.map((name) => `${name} “${view[name]}”`);
  for (const name of unknown) view[name] = PLAIN[name];
  unknown = lost;
}

function writeAddress() {
  const told = new URLSearchParams(Object.entries(view).filter(([name, value]) => value !== PLAIN[name]));
  history.replaceState(null, "", `#${told}`);
}

// Which rows are shown, in which order, and how many there are in all (also those that are not in this page).
const searched = (row) => (row.searched ??= [row.text, row.id, pathOf(row.path), row.own === null ? "" : data.products[row.own].title].join(" ").normalize("NFKC").toLowerCase());

function fitting(except = "") {
  const direction = data.directions.findIndex(([name]) => name === view.direction), words = view.text.normalize("NFKC").toLowerCase().split(/\s+/).filter(Boolean);
  return data.rows.filter((row) => (direction < 0 || row.d === direction) && within(pathOf(row.path), view.category) && (except === "kind" || !view.kind || row.kind === view.kind) && words.every((word) => searched(row).includes(word)));
}

const sorted = (rows) => (view.sort === "disagreement" ? rows : [...rows].sort(SORTS[view.sort][1])); // rows come most changed first, and sorting keeps that order among equals

function totals(direction, category) {
  const found = { n: 0, won: 0, lost: 0, moved: 0, same: 0 };
  for (const [d, path, ...numbers] of data.counts) {
    if ((direction && data.directions[d][0] !== direction) || !within(pathOf(path), category)) continue;
    KINDS.forEach((kind, place) => { found[kind] += numbers[place]; found.n += numbers[place]; });
  }
  return found;
}

// One query: what was asked, what A and B found first, and on demand everything else.
function picture(place, alt) {
  if (place === null) return make("span", { class: "none" }, "no picture");
  if (place < 0) return make("span", { class: "none" }, "picture left out");
  return make("img", { src: data.pictures[place], alt, decoding: "async" });
}

const scoreWords = (score) => (score === null ? "no score" : score.toFixed(3));
const titled = (product) => product.title || `no title (${product.id})`;
const chip = (kind) => make("span", { class: `kind ${kind}` }, make("span", { "aria-hidden": "true" }, `${SIGNS[kind]} `), kind);
const rankWords = (row) => (row.answers ? `rank ${counted(row.a)} → ${counted(row.b)}` : "no right product in the gallery");

function asked(row, place) {
  const text = row.text ? make("q", {}, foreign(row.text)) : make("span", { class: "soft" }, row.picture === null ? "nothing" : "picture only");
  const about = make("div", {}, make("h3", { id: `q${place}` }, text), make("p", {}, chip(row.kind), " ", make("b", {}, rankWords(row))),
    make("p", { class: "soft" }, make("code", {}, data.directions[row.d][0]), ` · the lists share ${row.shared} of ${row.longest}`), row.path === null ? "" : make("p", { class: "soft" }, foreign(pathOf(row.path))));
  return make("div", { class: "asked" }, row.picture === null ? "" : make("div", { class: "picture" }, picture(row.picture, "the query's picture")), about);
}

function hitCard(row, letter, place) {
  const found = row.lists[letter], product = data.products[found.products[place]], right = found.right[place];
  const told = right ? make("b", {}, `✓ ${place + 1}`, make("span", { class: "unseen" }, " right product")) : make("span", {}, `${place + 1}`);
  return make("li", right ? { class: "right", title: titled(product) } : { title: titled(product) }, make("div", { class: "picture" }, picture(product.picture, "")),
    make("div", { class: "place" }, told, make("span", {}, scoreWords(found.scores[place]))), make("div", { class: "title" }, foreign(titled(product))));
}

function answer(row, letter) {
  const found = row.lists[letter], beyond = row.answers && row[letter] > found.products.length;
  const note = !row.answers ? "" : beyond ? `right product at rank ${counted(row[letter])}, beyond this list` : row[letter] > data.hits ? `right product at rank ${row[letter]}, in the details` : "";
  const heading = make("h4", {}, make("b", { class: "letter" }, letterName(letter)), " ", foreign(nameOf(letter)), note ? make("span", { class: "soft" }, ` · ${note}`) : "");
  const list = make("ol", { class: "hits" }, ...range(Math.min(data.hits, found.products.length)).map((place) => hitCard(row, letter, place)));
  return make("section", { class: "answer", "aria-label": `first products of ${letterName(letter)}` }, heading, found.products.length ? list : make("p", { class: "soft" }, "Nothing was found."));
}

// What the query's product and a hit have in common: the deepest common category, then attribute values.
function common(row, product) {
  if (row.own === null) return [];
  const mine = new Set(data.products[row.own].facts), shared = product.facts.filter((fact) => mine.has(fact)).map((fact) => data.facts[fact]);
  const categories = shared.filter(([, , level]) => level);
  return [...categories.slice(-1), ...shared.filter(([, , level]) => !level)];
}

const commonWords = (pairs) => pairs.flatMap(([name, value], place) => [place ? ", " : "", foreign(name.replaceAll("_", " ")), ": ", foreign(value)]);
const expertWords = (shares) => (shares ?? []).flatMap((share, expert) => [make("span", {}, `${expert}: ${Math.round(100 * share)} %`), " "]);

function hitTable(row, letter) {
  const found = row.lists[letter], routing = row.why?.[letter]?.routing ?? null;
  const head = ["Place", "Product", "Score", "In common with the query", ...(routing ? ["Experts"] : [])];
  const rows = found.products.map((at, place) => {
    const product = data.products[at], pairs = common(row, product);
    return make("tr", found.right[place] ? { class: "ours" } : {}, make("th", { scope: "row" }, found.right[place] ? make("span", {}, "✓", make("span", { class: "unseen" }, "right product, "), ` ${place + 1}`) : `${place + 1}`),
      make("td", {}, foreign(titled(product)), make("span", { class: "ci" }, foreign(product.id))), make("td", { class: "number" }, scoreWords(found.scores[place])), make("td", { class: "common" }, ...(pairs.length ? commonWords(pairs) : ["nothing"])),
      ...(routing ? [make("td", { class: "experts" }, ...expertWords(routing[at]))] : []));
  });
  const table = make("table", { class: "prose" }, make("thead", {}, make("tr", {}, ...head.map((name) => make("th", { scope: "col" }, name)))), make("tbody", {}, ...rows));
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `all kept products of ${letterName(letter)}` }, table);
}

const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(3);

function heat(row, letter) {
  const why = row.why?.[letter];
  if (!why) return "";
  if (why.error) return make("p", { class: "soft" }, `No heatmap of ${letterName(letter)}'s first product: `, foreign(why.error));
  const most = Math.max(0, ...why.words.map(([, value]) => Math.abs(value)));
  const words = why.words.map(([word, value]) => {
    const shown = make("span", { class: "word" }, foreign(word), make("small", {}, signed(value)));
    if (most > 0) shown.style.backgroundColor = `rgb(var(${value > 0 ? "--for" : "--against"}) / ${(0.45 * Math.abs(value) / most).toFixed(3)})`;
    return shown;
  });
  const told = make("p", { class: "soft" }, `Why ${letterName(letter)} put this first: ${why.method}, score ${why.score.toFixed(3)}; orange speaks for the match, blue against it. ${why.trust} ${why.note}`);
  const shown = why.picture === null ? "" : make("img", { src: data.pictures[why.picture], alt: "the product's picture, its cells coloured by their part in the score: orange for the match, blue against it" });
  return make("div", { class: "why" }, shown, make("div", {}, words.length ? make("p", { class: "words" }, ...words.flatMap((word) => [word, " "])) : "", told));
}

function details(row) {
  const sides = LETTERS.map((letter) => make("section", {}, make("h4", {}, make("b", { class: "letter" }, letterName(letter)), " ", foreign(nameOf(letter))), heat(row, letter), hitTable(row, letter)));
  return make("div", { class: "details" }, make("p", { class: "soft" }, "Query ", foreign(row.id), row.own === null ? "" : ", product ", row.own === null ? "" : foreign(titled(data.products[row.own]))), ...sides);
}

function card(row, place) {
  const button = make("button", { type: "button", class: "more", "aria-expanded": "false", onclick: () => toggle(shown) }, "Details");
  const article = make("article", { class: "row", tabindex: "-1", "aria-labelledby": `q${place}` }, asked(row, place), make("div", { class: "answers" }, answer(row, "a"), answer(row, "b")), button);
  const shown = { row, article, button, details: null };
  article.addEventListener("focusin", () => point(shown));
  return shown;
}

// The list: a few at a time, one of them the current one.
const list = make("div", { id: "rows" }), rest = make("button", { type: "button", id: "rest", onclick: () => more() }), status = make("p", { id: "status", role: "status" });
let rows = [], cards = [], current = null;

function more(count = STEP) {
  const next = rows.slice(cards.length, cards.length + count).map((row, place) => card(row, cards.length + place));
  cards.push(...next);
  list.append(...next.map((shown) => shown.article));
  if (!current && cards.length) point(cards[0]);
  rest.hidden = cards.length >= rows.length;
  rest.textContent = `Show ${counted(Math.min(STEP, rows.length - cards.length))} more of ${counted(rows.length)}`;
}

function point(shown) {
  if (current) current.article.tabIndex = -1;
  current = shown;
  shown.article.tabIndex = 0;
}

function toggle(shown, open = !shown.details) {
  if (open === Boolean(shown.details)) return;
  if (open) shown.article.append((shown.details = details(shown.row)));
  else { shown.details.remove(); shown.details = null; }
  shown.button.setAttribute("aria-expanded", String(open));
  shown.button.textContent = open ? "Close" : "Details";
  view.query = open ? keyOf(shown.row) : "";
  writeAddress();
}

function go(step) {
  const inside = list.contains(document.activeElement), place = inside ? cards.indexOf(current) + step : Math.max(0, cards.indexOf(current));
  if (place >= cards.length) more();
  cards[Math.min(cards.length - 1, Math.max(0, place))]?.article.focus();
}

function key(event) {
  const at = event.target;
  if (event.ctrlKey || event.metaKey || event.altKey || at.closest("input, select, textarea")) return;
  const here = at.closest("article.row"), arrows = here && !at.closest(".scroll");
  if (event.key === "j" || (arrows && event.key === "ArrowDown")) go(1);
  else if (event.key === "k" || (arrows && event.key === "ArrowUp")) go(-1);
  else if (event.key === "Enter" && at === here) toggle(current);
  else if (event.key === "Escape" && here) { toggle(current, false); here.focus(); }
  else if (event.key === "/") controls.text.focus();
  else return;
  event.preventDefault();
}

// Controls: each writes into `view` and draws again.
const controls = {};

function choose(change) {
  Object.assign(view, change, { query: "" });
  unknown = [];
  writeAddress();
  drawList();
}

function select(name, label, options) {
  controls[name] = make("select", { id: name, onchange: () => choose({ [name]: controls[name].value }) }, ...options.map(([value, words]) => make("option", { value }, words)));
  return make("label", { class: "control" }, make("span", {}, label), controls[name]);
}

function categories() {
  const found = new Set(data.paths.flatMap((path) => path.map((_, depth) => path.slice(0, depth + 1).join(" > "))));
  return [...found].sort((one, other) => one.localeCompare(other, "en"));
}

function kindChoice() {
  controls.kinds = ["", ...KINDS].map((kind) => {
    const input = make("input", { type: "radio", name: "kind", value: kind, onchange: () => choose({ kind }) }), number = make("span", { class: "number" });
    return { kind, input, number, label: make("label", { class: kind || "all" }, input, make("span", {}, kind ? `${SIGNS[kind]} ${kind} ` : "all ", number)) };
  });
  return make("fieldset", { class: "kinds" }, make("legend", { class: "unseen" }, "What happened from A to B"), ...controls.kinds.map((choice) => choice.label));
}

function bar() {
  controls.text = make("input", { type: "search", id: "text", autocomplete: "off", oninput: () => choose({ text: controls.text.value.trim() }) });
  const choices = [["", "all directions"], ...data.directions.map(([name, words]) => [name, words ? `${name}, ${words}` : name])], named = categories();
  return make("form", { id: "controls", "aria-label": "which queries are shown", onsubmit: (event) => event.preventDefault() }, kindChoice(), select("direction", "Direction", choices),
    named.length ? select("category", "Category", [["", "all categories"], ...named.map((name) => [name, name])]) : "", select("sort", "Order", Object.entries(SORTS).map(([name, [words]]) => [name, words])),
    make("label", { class: "control" }, make("span", {}, "Text in query, id or title"), controls.text), make("button", { type: "button", onclick: () => choose({ ...PLAIN }) }, "Reset"));
}

// The table by category: sorted by the column that was asked for, a name filters the list.
const byCategory = { root: document.getElementById("categories"), column: "n", down: true, all: false };

function categoryRows() {
  const first = new Set(data.paths.map((path) => path[0])), depth = first.size > 1 ? 1 : 2;
  const names = new Set(data.paths.map((path) => path.slice(0, depth).join(" > ")));
  const found = [...names].map((name) => ({ name, ...totals(view.direction, name) })).map((row) => ({ ...row, net: row.won - row.lost })).filter((row) => row.n);
  const by = byCategory.column, turn = byCategory.down ? -1 : 1;
  return found.sort((one, other) => turn * (by === "name" ? one.name.localeCompare(other.name, "en") : one[by] - other[by]) || one.name.localeCompare(other.name, "en"));
}

const refocus = (which, words) => [...byCategory.root.querySelectorAll(which)].find((button) => button.textContent === words)?.focus(); // the table was drawn anew

function drawCategories() {
  const { root } = byCategory, found = categoryRows();
  if (!root || !data.paths.length) return;
  const columns = [["name", "Category"], ["n", "Queries"], ["won", "▲ won"], ["lost", "▼ lost"], ["net", "won − lost"], ["moved", "◆ moved"], ["same", "= same"]];
  const sortBy = (name) => { Object.assign(byCategory, { down: byCategory.column === name ? !byCategory.down : name !== "name", column: name }); drawCategories(); root.querySelector(`[data-by="${name}"]`).focus(); };
  const head = columns.map(([name, words]) => make("th", { scope: "col", "aria-sort": byCategory.column === name ? (byCategory.down ? "descending" : "ascending") : "none" },
    make("button", { type: "button", class: "plain", "data-by": name, onclick: () => sortBy(name) }, words, make("span", { "aria-hidden": "true" }, byCategory.column === name ? (byCategory.down ? " ↓" : " ↑") : ""))));
  const body = (byCategory.all ? found : found.slice(0, FEW)).map((row) => make("tr", row.name === view.category ? { class: "ours" } : {},
    make("th", { scope: "row" }, make("button", { type: "button", class: "plain", "aria-pressed": String(row.name === view.category), onclick: () => { choose({ category: row.name === view.category ? "" : row.name }); refocus("tbody button", row.name); } }, foreign(row.name))),
    ...columns.slice(1).map(([name]) => make("td", {}, name === "net" && row.net > 0 ? `+${row.net}` : counted(row[name]).replace("-", "−")))));
  const all = found.length > FEW ? make("button", { type: "button", onclick: () => { byCategory.all = !byCategory.all; drawCategories(); root.lastChild.focus(); } }, byCategory.all ? "Show fewer" : `Show all ${found.length}`) : "";
  root.replaceChildren(make("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": "by category" }, make("table", {}, make("caption", {}, make("span", {}, view.direction ? `Direction ${view.direction}` : "All directions together")),
    make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body))), all);
}

// Draws the list for what is chosen.
function drawList() {
  const total = totals(view.direction, view.category);
  for (const name of ["direction", "category", "sort"]) if (controls[name]) controls[name].value = view[name];
  if (controls.text.value.trim() !== view.text) controls.text.value = view.text;
  for (const { kind, input, number } of controls.kinds) { input.checked = kind === view.kind; number.textContent = counted(kind ? total[kind] : total.n); }
  rows = sorted(fitting());
  [cards, current] = [[], null];
  list.replaceChildren();
  more(Math.max(STEP, view.query ? rows.findIndex((row) => keyOf(row) === view.query) + 1 : 0));
  const there = view.kind ? total[view.kind] : total.n, left = !view.text && there > rows.length;
  const lost = unknown.length ? `This page has no ${unknown.join(", no ")}. ` : "";
  status.textContent = `${lost}${several(rows.length, "query", "queries")}${view.text ? " with this text" : ""}${left ? ` of ${counted(there)}: the most changed of each direction are in this page` : ""}.${rows.length ? "" : " Choose something else, or reset."}`;
  drawCategories();
}

function show() {
  readAddress();
  const wanted = view.query;
  drawList();
  const found = wanted && cards.find((shown) => keyOf(shown.row) === wanted);
  if (found) { toggle(found, true); found.article.focus(); found.article.scrollIntoView({ block: "start" }); }
}

const keys = make("p", { class: "soft keys" }, make("kbd", {}, "j"), " ", make("kbd", {}, "k"), " or arrows: next, previous query · ", make("kbd", {}, "Enter"), ": details · ", make("kbd", {}, "Esc"), ": close · ", make("kbd", {}, "/"), ": search. The address keeps the view: send it with the file.");
document.getElementById("list").replaceChildren(bar(), status, keys, list, rest);
document.addEventListener("keydown", key);
addEventListener("hashchange", show);
new IntersectionObserver((seen) => { if (seen.some((entry) => entry.isIntersecting) && cards.length < rows.length) more(); }, { rootMargin: "600px" }).observe(rest);
show();
