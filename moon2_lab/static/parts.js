// What the widgets share; it stands before the file of each of them. Nothing here asks anything of the network; texts are put in as text, never as HTML.

const KEYED = ["input", "select", "button", "gridcell", "option", "listbox"]; // what takes keys; JupyterLab looks for this mark on the element itself before it takes them

function put(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  if (KEYED.includes(tag) || KEYED.includes(attributes.role)) element.setAttribute("data-lm-suppress-shortcuts", "true");
  return put(element, attributes, children);
}

// The same for what is drawn as SVG.
const SVG = ["http:", "//www.w3.org/2000/svg"].join("");  // a name, and no address: pages are searched for addresses
const draw = (tag, attributes = {}, ...children) => put(document.createElementNS(SVG, tag), attributes, children);

const range = (count) => Array.from({ length: count }, (_, place) => place);

// Whether a kernel answers a "hello". `heard`: null is not known yet; after a silence it is false until something is heard. `quiet`: no answer for a while.
class Kernel {
  constructor(model, changed, silence = 4000) { // milliseconds
    Object.assign(this, { model, changed, silence, heard: null, quiet: false });
    this.hear = (message) => {
      if (message?.do !== "hello") return;
      clearTimeout(this.timer);
      Object.assign(this, { heard: true, quiet: false });
      this.changed();
    };
    model.on("msg:custom", this.hear);
  }

  ask() {
    try { this.model.send({ do: "hello" }); } catch { /* no kernel */ }
    clearTimeout(this.timer);
    this.timer = setTimeout(() => { this.quiet = true; this.heard ??= false; this.changed(); }, this.silence);
  }

  close() { clearTimeout(this.timer); this.model.off("msg:custom", this.hear); }
}

function bytesOf(view) {
  return view instanceof Uint8Array ? view : new Uint8Array(view.buffer ?? view, view.byteOffset ?? 0, view.byteLength);
}

// [rows, columns] of the cells of a side's picture: its `grid` is one number for a square, 0 without a picture.
const gridOf = (part) => (Array.isArray(part.grid) ? part.grid : [part.grid, part.grid]);
const cellsOf = (part) => gridOf(part)[0] * gridOf(part)[1];

// A picture that is no square: its frame has its aspect (width / height), and is no higher than a square's.
function takeAspect(frame, aspect) {
  if (aspect) Object.assign(frame.style, { aspectRatio: aspect, maxWidth: `${20 * Math.min(1, aspect)}rem` });
}

// A picture in cells and a title in words, one of which can be pointed at, reached by arrow keys, and pinned.
// Who extends it gives this.part ({ grid, words }), draw() and announce().
class Pointing {
  constructor(fields) { Object.assign(this, { active: null, pinned: false, cells: [], words: [] }, fields); }

  hear(root) {
    root.addEventListener("pointerleave", () => this.leave());
    root.addEventListener("keydown", (event) => this.key(event));
    return root;
  }

  target(kind, place, element) {
    const all = kind === "cell" ? this.cells : this.words;
    element.tabIndex = place ? -1 : 0;
    element.addEventListener("pointerenter", () => this.pinned || this.activate(kind, place));
    element.addEventListener("focus", () => this.activate(kind, place));
    element.addEventListener("blur", () => this.leave());
    element.addEventListener("click", () => { const same = this.pinned && this.is(kind, place); this.activate(kind, place); this.pinned = !same; this.draw(); });
    all.push(element);
    return element;
  }

  is(kind, place) { return this.active !== null && this.active.kind === kind && this.active.place === place; }

  activate(kind, place) { this.active = { kind, place }; this.draw(); this.announce(); }

  leave() { if (!this.pinned && this.active) { this.active = null; this.draw(); } }

  key(event) {
    const all = [this.words, this.cells].find((some) => some.includes(event.target));
    if (!all) return;
    const now = all.indexOf(event.target), wide = all === this.cells ? gridOf(this.part)[1] : 1;
    const column = now % wide, moves = { ArrowLeft: wide > 1 && !column ? 0 : -1, ArrowRight: wide > 1 && column === wide - 1 ? 0 : 1, ArrowUp: -wide, ArrowDown: wide };
    const next = event.key === "Home" ? 0 : event.key === "End" ? all.length - 1 : event.key in moves ? now + moves[event.key] : null;
    if (event.key === "Escape") { this.pinned = false; this.active = null; this.draw(); }
    else if (event.key === "Enter" || event.key === " ") event.target.click();
    else if (next === null) return;
    else if (all[next]) { this.pinned = false; all[next].focus(); }
    event.preventDefault();
    event.stopPropagation();
  }

  nameOf(kind, place) {
    const columns = gridOf(this.part)[1];
    if (kind === "cell" && this.cells.length === 1) return "the picture";
    return kind === "word" ? `“${this.part.words[place][1]}”` : `row ${Math.floor(place / columns) + 1}, column ${(place % columns) + 1}`;
  }
}
