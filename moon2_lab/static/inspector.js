// The filter inspector. Python keeps the list; this file shows one page of it, asks for the pictures of that page, and tells what was pressed.
// It asks nothing of the network. Titles are put in as text, never as HTML.

const TRAITS = ["view", "order", "label", "verdict", "search", "rows", "detail", "summary"];
const VIEWS = [["mm", "picture + text"], ["t", "text"], ["i", "picture"]], PLACES = { t: 0, i: 1, mm: 2 };
const ORDERS = [["low", "lowest phi first"], ["high", "highest phi first"], ["often", "most often doubted first"]];
const VERDICTS = [["all", "all"], ["none", "none yet"], ["put_back", "put back"], ["drop", "dropped"]], NAMES = { put_back: "put back", drop: "dropped", "": "no verdict" };
const KEYS = { p: "put_back", d: "drop" }, PAGE = 12;
const written = (value) => (value === null || value === undefined ? "–" : value.toFixed(2));
const counted = (number, one, many) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
const readable = (label) => label.replaceAll("_", " ");
const viewName = (view) => VIEWS.find(([name]) => name === view)[1];

// Thumbnails: asked for in one message, kept for a while, shown when they come.
class Pictures {
  constructor(model, changed) {
    Object.assign(this, { model, changed, known: new Map(), asked: new Set(), wanted: { small: new Set(), large: new Set() } });
    this.listen = (message, buffers) => { if (message.pictures !== undefined) this.take(message, buffers); };
    model.on("msg:custom", this.listen);
  }

  take({ pictures, size, found }, buffers) {
    const key = `${size} ${pictures}`;
    this.forget(key);
    this.known.set(key, found.map((one) => (one.at === undefined ? { why: one.why } : { url: URL.createObjectURL(new Blob([buffers[one.at]], { type: "image/jpeg" })) })));
    this.asked.delete(key);
    for (const old of [...this.known.keys()].slice(0, Math.max(0, this.known.size - 120))) this.forget(old);
    this.changed();
  }

  forget(key) { for (const one of this.known.get(key) ?? []) if (one.url) URL.revokeObjectURL(one.url); this.known.delete(key); }

  get(id, size) {
    const key = `${size} ${id}`;
    if (!this.known.has(key) && !this.asked.has(key)) {
      this.asked.add(key);
      this.wanted[size].add(id);
      if (!this.due) this.due = setTimeout(() => this.ask(), 0);
    }
    return this.known.get(key) ?? null;
  }

  ask() {
    this.due = null;
    for (const size of ["large", "small"]) {
      if (this.wanted[size].size) this.model.send({ do: "pictures", size, ids: [...this.wanted[size]] });
      this.wanted[size].clear();
    }
  }

  close() { this.model.off("msg:custom", this.listen); clearTimeout(this.due); for (const key of [...this.known.keys()]) this.forget(key); }
}

function fillPicture(frame, one, alt) {
  const state = one === null ? "wait" : one.url ?? `why ${one.why}`;
  if (frame.dataset.state === state) return;
  frame.dataset.state = state;
  frame.replaceChildren(one === null ? make("span", { class: "m2i-none" }, "…") : one.url ? make("img", { src: one.url, alt, draggable: "false" }) : make("span", { class: "m2i-none" }, one.why));
}

// phi over the steps: circles where the filter doubted the triplet, squares where it was sampled.
function curve(points, view, threshold) {
  const place = 2 + PLACES[view], known = points.filter((point) => point[place] !== null);
  if (!known.length) return make("p", { class: "m2i-note" }, points.length ? "phi of this view was never noted." : "Never doubted by the filter, and not among the triplets that were sampled.");
  const [W, H, left, right, top, low] = [360, 150, 34, 10, 10, 24], steps = known.map((point) => point[0]), first = Math.min(...steps), last = Math.max(...steps);
  const x = (step) => (last > first ? left + ((W - left - right) * (step - first)) / (last - first) : (left + W - right) / 2), y = (phi) => top + (H - top - low) * (1 - phi);
  const line = (level, name) => [draw("line", { x1: left, x2: W - right, y1: y(level), y2: y(level), class: name }), draw("text", { x: left - 5, y: y(level) + 4, "text-anchor": "end" }, level.toFixed(1))];
  const marks = known.map((point) => {
    const [step, source] = point, phi = point[place], name = `m2i-${source}${phi < threshold ? " m2i-low" : ""}`;
    const mark = source === "doubted" ? draw("circle", { cx: x(step), cy: y(phi), r: 4, class: name }) : draw("rect", { x: x(step) - 3.5, y: y(phi) - 3.5, width: 7, height: 7, class: name });
    mark.append(draw("title", {}, `step ${step}: phi ${phi.toFixed(3)}, ${source}`));
    return mark;
  });
  const ends = [draw("text", { x: x(first), y: H - 7, "text-anchor": last > first ? "start" : "middle" }, `step ${first}`), ...(last > first ? [draw("text", { x: x(last), y: H - 7, "text-anchor": "end" }, `step ${last}`)] : [])];
  const told = `phi of the ${viewName(view)} query over the steps: ${counted(known.length, "point", "points")}, from ${written(known[0][place])} at step ${first} to ${written(known[known.length - 1][place])} at step ${last}; threshold ${threshold}`;
  return draw("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": told, class: "m2i-curve" }, ...line(0, "m2i-axis"), ...line(1, "m2i-axis"), ...line(threshold, "m2i-threshold"),
    draw("polyline", { points: known.map((point) => `${x(point[0]).toFixed(1)},${y(point[place]).toFixed(1)}`).join(" "), class: "m2i-line" }), ...marks, ...ends);
}

function bar(phi, threshold) {
  const track = make("span", { class: "m2i-bar", "aria-hidden": "true" }, make("span", { class: phi !== null && phi < threshold ? "m2i-low" : "" }), make("i"));
  track.firstChild.style.width = `${100 * (phi ?? 0)}%`;
  track.lastChild.style.left = `${100 * threshold}%`;
  return track;
}

class Inspector {
  constructor(model) {
    Object.assign(this, { model, want: null, turns: 0, pending: false, later: [], drafts: new Map(), name: `m2i${Math.random().toString(36).slice(2, 9)}`, told: null });
    this.pictures = new Pictures(model, () => this.soon());
    this.counts = make("p", { class: "m2i-counts" });
    this.warning = make("p", { class: "m2i-warning", role: "alert", hidden: true });
    this.live = make("p", { class: "m2i-unseen", role: "status", "aria-live": "polite" });
    this.list = make("div", { class: "m2i-list", role: "listbox", tabindex: 0, "aria-label": "triplets; arrow keys move, p puts back, d drops, u undoes" });
    this.back = this.button("‹ Back", () => this.go((Math.floor(this.at() / PAGE) - 1) * PAGE));
    this.next = this.button("Next ›", () => this.go((Math.floor(this.at() / PAGE) + 1) * PAGE));
    this.where = make("span", {});
    this.detail = make("section", { class: "m2i-detail", "aria-label": "the chosen triplet" }, ...this.details());
    const lists = make("div", { class: "m2i-side" }, this.list, make("div", { class: "m2i-pages" }, this.back, this.where, this.next));
    this.root = make("div", { class: "m2i", role: "group", "aria-label": "filter inspector", tabindex: -1, "data-lm-suppress-shortcuts": "true" }, this.controls(), this.counts, this.warning, make("div", { class: "m2i-both" }, lists, this.detail), this.live);
    this.root.addEventListener("keydown", (event) => this.key(event));
    this.list.addEventListener("click", (event) => { const row = event.target.closest("[role=option]"); if (row) this.go(Number(row.dataset.at)); this.list.focus({ preventScroll: true }); });
    this.changed = () => { this.answered(); this.soon(); };
    for (const trait of TRAITS) model.on(`change:${trait}`, this.changed);
    this.draw();
  }

  close() {
    cancelAnimationFrame(this.asked);
    clearTimeout(this.typing);
    for (const trait of TRAITS) this.model.off(`change:${trait}`, this.changed);
    this.pictures.close();
  }

  get(name) { return this.model.get(name); }

  focused() { return this.root.getRootNode().activeElement; }

  at() { return this.want ?? this.get("summary").at; }

  soon() { cancelAnimationFrame(this.asked); this.asked = requestAnimationFrame(() => this.draw()); }

  button(words, press, attributes = {}) { return make("button", { type: "button", onclick: press, ...attributes }, ...[words].flat()); }

  set(name, value) { this.want = null; this.model.set(name, value); this.model.save_changes(); }

  // The controls over the list.
  controls() {
    const select = (words, trait, options) => {
      const control = make("select", { onchange: () => this.set(trait, control.value) });
      control.fill = (some) => { const key = JSON.stringify(some); if (control.key !== key) control.replaceChildren(...some.map(([value, name]) => make("option", { value }, name))); control.key = key; };
      control.fill(options);
      this.selects[trait] = control;
      return make("label", { "data-control": words }, make("span", {}, words), control);
    };
    this.selects = {};
    const send = () => { clearTimeout(this.typing); if (this.search.value !== this.get("search")) this.set("search", this.search.value); };
    this.search = make("input", { type: "search", placeholder: "words or id", oninput: () => { clearTimeout(this.typing); this.typing = setTimeout(send, 250); }, onchange: send });
    return make("div", { class: "m2i-controls", role: "group", "aria-label": "what is listed" }, select("query view", "view", VIEWS), select("order", "order", ORDERS), select("label", "label", []), select("verdict", "verdict", VERDICTS),
      make("label", { "data-control": "search" }, make("span", {}, "search"), this.search));
  }

  // The parts of the right side; they stay, so that focus stays.
  details() {
    const verdict = (words, key) => this.button([make("span", {}, words), make("kbd", { "aria-hidden": "true" }, key.toUpperCase())], () => this.judge(KEYS[key]), { "data-verdict": KEYS[key], "aria-keyshortcuts": key, "aria-pressed": "false" });
    this.putBack = verdict("Put back", "p"); this.drop = verdict("Drop", "d");
    this.undo = this.button([make("span", {}, "Undo"), make("kbd", { "aria-hidden": "true" }, "U")], () => this.takeBack(), { "data-verdict": "undo", "aria-keyshortcuts": "u" });
    this.note = make("input", { type: "text", maxlength: 500, placeholder: "why", oninput: () => this.drafts.set(this.get("detail").id, this.note.value), onchange: () => this.noted() });
    this.heading = make("h3", {}); this.figures = make("div", { class: "m2i-figures" }); this.facts = make("div", { class: "m2i-facts" });
    this.empty = make("p", { class: "m2i-note" }, "No triplet passes the filters.");
    this.whole = make("div", {}, this.heading, make("div", { class: "m2i-verdicts", role: "group", "aria-label": "verdict" }, this.putBack, this.drop, this.undo, make("label", { "data-control": "note" }, make("span", {}, "note"), this.note)), this.figures, this.facts);
    return [this.empty, this.whole];
  }

  // What is pressed before Python has answered waits for the answer, so that a verdict is about the triplet that was moved to.
  tellPython(message) {
    this.turn = `${this.name} ${(this.turns += 1)}`;
    this.pending = true;
    this.model.send({ ...message, turn: this.turn });
  }

  answered() { if (this.get("summary").turn === this.turn) { this.pending = false; this.want = null; } }

  when(act) { if (this.pending || this.later.length) this.later.push(act); else act(); }

  go(to) { if (!this.later.length && this.want !== null) this.move(to); else this.when(() => this.move(to)); }

  step(by) { if (!this.later.length && this.want !== null) this.move(this.at() + by); else this.when(() => this.move(this.at() + by)); }

  move(to) {
    const { shown } = this.get("summary"), place = Math.max(0, Math.min(to, shown - 1));
    if (!shown || place === this.at()) return;
    this.want = place;
    this.tellPython({ do: "move", to: place });
  }

  judge(kind) {
    this.when(() => {
      const detail = this.get("detail");
      if (detail.id === undefined) return;
      this.tellPython({ do: "judge", id: detail.id, kind: detail.kind === kind ? null : kind, note: this.drafts.get(detail.id) ?? detail.note });
      this.drafts.delete(detail.id);
    });
  }

  noted() {
    const detail = this.get("detail");
    if (!detail.kind || this.note.value === detail.note) return; // without a verdict the note waits for one
    this.tellPython({ do: "judge", id: detail.id, kind: detail.kind, note: this.note.value });
    this.drafts.delete(detail.id);
  }

  takeBack() { this.when(() => { if (this.get("summary").undo) this.tellPython({ do: "undo" }); else this.say("Nothing to undo."); }); }

  key(event) {
    if (["INPUT", "SELECT"].includes(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey) { event.stopPropagation(); return; }
    const moves = { ArrowUp: -1, ArrowDown: 1, PageUp: -PAGE, PageDown: PAGE, Home: -Infinity, End: Infinity }, key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (key in moves && event.target.tagName !== "BUTTON") this.step(moves[key]);
    else if (key in KEYS) this.judge(KEYS[key]);
    else if (key === "u") this.takeBack();
    else { if (!["Tab", "Escape"].includes(key)) event.stopPropagation(); return; }
    event.preventDefault();
    event.stopPropagation();
  }

  say(words) { this.live.textContent = words; }

  draw() {
    const summary = this.get("summary"), detail = this.get("detail");
    this.drawControls(summary);
    this.drawList(summary);
    this.drawDetail(summary, detail);
    this.tell(summary, detail);
    while (!this.pending && this.later.length) this.later.shift()();
  }

  drawControls(summary) {
    this.selects.label.fill([["all", "all"], ...summary.labels.map((label) => [label, readable(label)])]);
    for (const [trait, control] of Object.entries(this.selects)) control.value = this.get(trait);
    if (this.focused() !== this.search) this.search.value = this.get("search");
    const words = [counted(summary.total, "triplet", "triplets"), `${summary.shown.toLocaleString("en")} listed`, `${summary.doubted.toLocaleString("en")} under phi ${summary.threshold} (${viewName(this.get("view"))})`];
    if (summary.unknown) words.push(`${summary.unknown.toLocaleString("en")} without a known phi`);
    this.counts.replaceChildren(words.join(" · "), " · ", make("b", {}, `${summary.put_back} put back, ${summary.drop} dropped`));
    this.warning.hidden = !summary.message;
    if (this.warning.textContent !== summary.message) this.warning.textContent = summary.message;
    this.back.disabled = summary.at < PAGE; this.next.disabled = Math.floor(summary.at / PAGE) + 1 >= summary.pages;
    this.where.textContent = `page ${Math.floor(summary.at / PAGE) + 1} of ${summary.pages}`;
  }

  drawList(summary) {
    const rows = this.get("rows"), view = this.get("view"), first = Math.floor(summary.at / PAGE) * PAGE, key = JSON.stringify([rows, view, first]);
    if (this.listKey !== key) this.list.replaceChildren(...rows.map((row, place) => this.row(row, first + place, PLACES[view], summary.threshold)));
    this.listKey = key;
    [...this.list.children].forEach((element, place) => {
      const here = first + place === summary.at;
      element.setAttribute("aria-selected", String(here));
      if (here) { this.list.setAttribute("aria-activedescendant", element.id); this.reveal(element); }
      const found = this.pictures.get(rows[place].id, "small");
      element.querySelectorAll(".m2i-thumb").forEach((frame, number) => fillPicture(frame, found && found[number].why ? { why: "×" } : found && found[number], ""));
    });
    if (!rows.length) this.list.removeAttribute("aria-activedescendant");
  }

  reveal(element) { // in the list only; the page stays where it is
    const top = element.offsetTop, box = this.list;
    if (top < box.scrollTop) box.scrollTop = top;
    else if (top + element.offsetHeight > box.scrollTop + box.clientHeight) box.scrollTop = top + element.offsetHeight - box.clientHeight;
  }

  row(row, at, place, threshold) {
    const phi = row.phi[place], low = phi !== null && phi < threshold, label = row.label ? readable(row.label) : "";
    const chips = [...(label ? [make("span", { class: "m2i-chip" }, label)] : []), ...(row.kind ? [make("span", { class: `m2i-chip m2i-${row.kind}` }, NAMES[row.kind])] : [])];
    const words = [row.asked ? row.text : `picture query for ${row.text}`, phi === null ? "phi not known" : `phi ${written(phi)}${low ? ", doubted" : ""}`, label, row.kind ? NAMES[row.kind] : ""].filter(Boolean).join("; ");
    return make("div", { role: "option", id: `${this.name}-${at}`, class: `m2i-row ${row.kind ? `m2i-is-${row.kind}` : ""}`, "data-at": at, "data-id": row.id, "aria-label": words },
      make("span", { class: "m2i-thumbs" }, ...row.parts.map((role) => make("span", { class: `m2i-thumb m2i-${role}` }))),
      make("span", { class: "m2i-words" }, make("bdi", { class: row.asked ? "" : "m2i-soft" }, row.asked ? row.text : row.text ? `(picture) ${row.text}` : "(picture only)"), make("span", { class: "m2i-chips" }, ...chips)),
      make("span", { class: "m2i-phi" }, make("b", { class: low ? "m2i-low" : "" }, written(phi)), bar(phi, threshold)));
  }

  drawDetail(summary, detail) {
    const there = detail.id !== undefined, view = this.get("view"), key = JSON.stringify([detail, view]);
    this.empty.hidden = there; this.whole.hidden = !there;
    this.undo.disabled = !summary.undo;
    if (!there) return;
    if (this.detailKey !== key) {
      this.heading.replaceChildren(make("bdi", {}, detail.id), ...(detail.label ? [make("span", { class: "m2i-chip" }, readable(detail.label))] : []), ...(detail.kind ? [make("span", { class: `m2i-chip m2i-${detail.kind}` }, NAMES[detail.kind])] : []));
      for (const button of [this.putBack, this.drop]) button.setAttribute("aria-pressed", String(button.dataset.verdict === detail.kind));
      if (this.focused() !== this.note || this.noteOf !== detail.id) this.note.value = this.drafts.get(detail.id) ?? detail.note;
      this.noteOf = detail.id;
      this.drawParts(detail);
      this.facts.replaceChildren(this.table(detail, view, summary.threshold), make("div", { class: "m2i-time" }, make("h4", {}, `phi over time, ${viewName(view)}`), curve(detail.curve, view, summary.threshold), this.history(detail)));
    }
    this.detailKey = key;
    const found = this.pictures.get(detail.id, "large");
    this.figures.querySelectorAll(".m2i-frame").forEach((frame, place) => fillPicture(frame, found && (found[place] ?? { why: "no picture" }), detail.full[place].text));
  }

  drawParts(detail) {
    const key = JSON.stringify([detail.id, detail.full]);
    if (this.partsKey !== key) {
      this.figures.replaceChildren(...detail.full.map(({ role, id, text }) => make("figure", { class: `m2i-${role}` }, make("div", { class: "m2i-frame" }),
        make("figcaption", {}, make("span", { class: "m2i-role" }, role, id ? make("bdi", { class: "m2i-soft" }, ` ${id}`) : ""), text ? make("bdi", {}, text) : make("span", { class: "m2i-soft" }, role === "query" ? "(no text)" : "(no title)")))),
        ...(detail.full.length < 3 ? [make("p", { class: "m2i-note" }, "This triplet has no negative: nothing to doubt, phi is 1.")] : []), ...(detail.more > 0 ? [make("p", { class: "m2i-note" }, `and ${counted(detail.more, "more negative", "more negatives")}`)] : []));
    }
    this.partsKey = key;
  }

  table(detail, view, threshold) {
    const head = make("thead", {}, make("tr", {}, ...["query view", "phi", "", "next weight"].map((words) => make("th", { scope: "col" }, words))));
    const rows = VIEWS.map(([name, words]) => {
      const phi = detail.phi[PLACES[name]], weight = detail.weight[PLACES[name]];
      return make("tr", { class: name === view ? "m2i-here" : "" }, make("th", { scope: "row" }, words), make("td", { class: phi !== null && phi < threshold ? "m2i-low" : "" }, written(phi)), make("td", {}, bar(phi, threshold)), make("td", {}, written(weight)));
    });
    const when = detail.step !== null ? `phi as it was when last doubted, at step ${detail.step}` : detail.phi.every((phi) => phi === null) ? "phi is not known" : "phi as measured";
    return make("div", {}, make("table", {}, head, make("tbody", {}, ...rows)), make("p", { class: "m2i-note" }, `${when}; threshold ${threshold}.${detail.trusted ? " Trusted already: the filter leaves it alone." : ""}`));
  }

  history(detail) {
    const words = detail.times ? `Weighed down ${counted(detail.times, "time", "times")}, ${detail.times === 1 ? `at step ${detail.first}` : `steps ${detail.first} to ${detail.last}`}.` : "Not in the ledger: never weighed down.";
    const thinned = detail.points > detail.curve.length ? ` Drawn: ${detail.curve.length} of ${detail.points} points.` : "";
    const kinds = new Set(detail.curve.map((point) => point[1]));
    const legend = [...(kinds.has("doubted") ? ["● doubted by the filter"] : []), ...(kinds.has("sampled") ? ["■ sampled"] : [])].join("   ");
    return make("p", { class: "m2i-note" }, words + thinned, ...(legend ? [make("br"), legend] : []));
  }

  tell(summary, detail) {
    const now = JSON.stringify([summary.put_back, summary.drop]), counts = `${summary.put_back} put back, ${summary.drop} dropped`;
    if (this.told !== null && this.told !== now) this.say(`${detail.id !== undefined && detail.id === this.toldId ? `${NAMES[detail.kind]}. ` : ""}${counts}.`);
    else if (this.told !== null && this.toldShown !== summary.shown) this.say(`${counted(summary.shown, "triplet", "triplets")} listed.`);
    this.told = now; this.toldId = detail.id; this.toldShown = summary.shown;
  }
}

function render({ model, el }) {
  const inspector = new Inspector(model);
  el.append(inspector.root);
  return () => inspector.close();
}

export default { render };
