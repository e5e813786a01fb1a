// What if: a query and an item are edited, and score, rank and hits are shown before and after. The kernel computes; the last edit wins.
// Nothing is asked of the network. Titles are put in as text, never as HTML.

const SIDES = ["query", "item"], WAIT = 300; // milliseconds of quiet before an edit is sent
const PICTURES = { own: "picture as it was", none: "without a picture", other: "another product's picture" };
const places = (rank, size) => (rank === null || rank === undefined ? "not known" : `${rank.toLocaleString("en")} of ${size.toLocaleString("en")}`);
const plainEdit = (start) => ({ text: start.text, picture: "own", other: "" });
let widgets = 0; // for names of radio buttons and lists that are unique on a page

// The boxes of one side; `change` is called with its edit.
class Side {
  constructor(name, start, list, change) {
    Object.assign(this, { name, start, change });
    const group = `m2w-${name}-${widgets}`, label = name === "query" ? "Query" : "Item";
    this.text = make("textarea", { rows: 2, "data-lm-suppress-shortcuts": "true", "aria-label": `${label}: text`, oninput: () => this.send() });
    this.radios = Object.entries(PICTURES).map(([value]) => make("input", { type: "radio", name: group, value, onchange: () => { this.offer(); if (value === "other") this.other.focus(); if (value !== "other" || this.other.value) this.send(); } }));
    this.other = make("input", { type: "text", list, autocomplete: "off", placeholder: "id, or words of its title", "aria-label": `${label}: whose picture`, oninput: () => this.send() });
    this.reset = make("button", { type: "button", onclick: () => { this.fill(plainEdit(start)); this.send(true); } }, `${label} as it was`);
    this.image = make("img", { alt: `picture of the ${name}`, class: "m2w-picture" });
    this.empty = make("p", { class: "m2w-picture m2w-none" }, "no picture");
    this.edits = make("p", { class: "m2w-soft" });
    this.boxes = make("fieldset", {}, make("legend", {}, label, " ", make("bdi", { class: "m2w-soft" }, start.id)),
      make("div", { class: "m2w-both" }, this.image, this.empty, make("div", { class: "m2w-words" }, this.text,
        make("div", { role: "radiogroup", "aria-label": `${label}: picture`, class: "m2w-radios" }, ...this.radios.map((radio) => make("label", {}, radio, PICTURES[radio.value]))), this.other)),
      make("div", { class: "m2w-foot" }, this.reset, this.edits));
  }

  get edit() { return { text: this.text.value, picture: this.radios.find((radio) => radio.checked)?.value ?? "own", other: this.other.value }; }

  fill(edit) {
    if (this.text.value !== edit.text) this.text.value = edit.text;
    for (const radio of this.radios) radio.checked = radio.value === edit.picture;
    if (this.other.value !== edit.other) this.other.value = edit.other;
    this.offer();
  }

  offer() { this.other.hidden = this.edit.picture !== "other"; }

  send(atOnce = false) { this.change(atOnce); }

  show(picture, edits) {
    this.image.hidden = !picture;
    this.empty.hidden = Boolean(picture);
    if (picture) this.image.src = picture; else this.image.removeAttribute("src");
    this.edits.textContent = edits.length ? `edited: ${edits.join("; ")}` : "not edited";
  }
}

// One list of hits; `mark` gives the words beside a hit.
function hitList(title, hits, pictures, mark) {
  const rows = hits.map((hit, place) => make("li", { class: mark(hit) ? "m2w-marked" : "" }, make("span", { class: "m2w-place" }, `${place + 1}`),
    pictures[hit.product_id] ? make("img", { src: pictures[hit.product_id], alt: "", width: 32, height: 32 }) : make("span", { class: "m2w-thumb" }),
    make("span", { class: "m2w-title" }, make("bdi", {}, hit.title || hit.product_id), mark(hit) ? make("b", {}, mark(hit)) : ""), make("span", { class: "m2w-score" }, hit.score.toFixed(3))));
  return make("section", {}, make("h4", {}, title), rows.length ? make("ol", {}, ...rows) : make("p", { class: "m2w-soft" }, "no hits: there is no gallery"));
}

function numbers(shown) {
  const { before, after } = shown, row = (name, old, now, words) => make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, old), make("td", {}, make("b", {}, now)), make("td", { class: "m2w-change" }, words));
  const rows = [row("score", before.score.toFixed(4), after.score.toFixed(4), shown.score)];
  if (after.rank !== null) rows.push(row("rank", places(before.rank, shown.gallery_size), places(after.rank, shown.gallery_size), shown.rank), row(`first ${after.hits.length} hits`, "", "", shown.hit));
  const head = make("tr", {}, ...["", "before", "after", "difference"].map((name) => make("th", { scope: "col" }, name)));
  return make("table", {}, make("caption", { class: "m2w-unseen" }, "before and after the edit"), make("thead", {}, head), make("tbody", {}, ...rows));
}

function hits(shown) {
  if (shown.after.rank === null) return "";
  const own = (hit, words) => (hit.product_id === shown.item_id ? "this item" : words), pictures = shown.pictures;
  return make("div", { class: "m2w-hits" },
    hitList("Hits before", shown.before.hits, shown.pictures_before, (hit) => (shown.went_out.includes(hit.product_id) ? `− went out${hit.product_id === shown.item_id ? ", this item" : ""}` : own(hit, ""))),
    hitList("Hits after", shown.after.hits, pictures, (hit) => (shown.came_in.includes(hit.product_id) ? `+ came in${hit.product_id === shown.item_id ? ", this item" : ""}` : own(hit, ""))));
}

function render({ model, el }) {
  widgets += 1;
  const start = model.get("start"), list = `m2w-list-${widgets}`;
  let timer = 0;
  const status = make("p", { class: "m2w-status", role: "status", "aria-live": "polite" }), wrong = make("p", { class: "m2w-wrong", role: "alert" }), answer = make("div", { class: "m2w-answer" });
  const send = () => {
    clearTimeout(timer);
    timer = 0;
    model.set("asked", { number: (model.get("asked").number ?? 0) + 1, ...Object.fromEntries(sides.map((side) => [side.name, side.edit])) });
    model.save_changes();
    kernel.ask();
    draw();
  };
  const later = (atOnce) => { clearTimeout(timer); timer = setTimeout(send, atOnce ? 0 : WAIT); draw(); };
  const sides = SIDES.map((name) => new Side(name, start.sides[name], list, later));
  const choices = make("datalist", { id: list }, ...start.gallery.map(([id, title]) => make("option", { value: id }, title)));
  const root = make("div", { class: "m2w", "data-lm-suppress-shortcuts": "true" }, choices, make("div", { class: "m2w-sides" }, ...sides.map((side) => side.boxes)), status, wrong, answer);
  let drawn = null;

  function draw() {
    const shown = model.get("shown"), waits = kernel.heard !== false && (timer !== 0 || (model.get("asked").number ?? 0) > shown.number);
    for (const side of sides) {
      side.boxes.disabled = kernel.heard === false;
      side.show(shown.sides[side.name].picture, shown.edits[side.name]);
    }
    const old = waits || Boolean(shown.error);
    answer.classList.toggle("m2w-old", old);
    answer.setAttribute("aria-busy", waits);
    wrong.textContent = shown.error && !waits ? shown.error : "";
    wrong.hidden = !wrong.textContent;
    status.textContent = kernel.heard === false ? "This is the last state. Editing needs a running kernel: run the cell again."
      : waits && kernel.quiet ? "No answer from the kernel yet: it is busy, or it was stopped. The numbers below are old."
      : waits ? "Computing; the numbers below are old." : shown.error ? "The numbers below are old: they are of the last edit that could be read."
        : `Score ${shown.score}${shown.rank ? `; rank: ${shown.rank}; hits: ${shown.hit}` : ""}. ${shown.seconds ? `Computed in ${shown.seconds.toFixed(2)} s.` : ""}`;
    if (drawn !== shown) { answer.replaceChildren(numbers(shown), hits(shown)); drawn = shown; }
  }

  const kernel = new Kernel(model, draw);
  const asked = () => { const now = model.get("asked"); if (timer === 0) for (const side of sides) side.fill(now[side.name] ?? plainEdit(side.start)); draw(); };
  el.append(root);
  model.on("change:shown", draw);
  model.on("change:asked", asked);
  asked();
  kernel.ask();
  return () => {
    clearTimeout(timer);
    kernel.close();
    model.off("change:shown", draw);
    model.off("change:asked", asked);
  };
}

export default { render };
