// The curves of a training run: panels with one shared step, values beside the names, curves that are switched on and off.
// It draws what it is given and asks nothing of the network. Names are put in as text, never as HTML.

const HEIGHT = 176, EDGE = { left: 46, right: 10, top: 8, bottom: 22 }, COLOURS = 8; // pixels; --s0 to --s7 of the style, each with its own dashes
const SOLID = ["weighted", "text", ""]; // kinds of curves that are drawn whole; the others are dotted, and their value stands in brackets
const shortest = (value) => (!Number.isFinite(value) ? "–" : Math.abs(value) >= 100 ? Math.round(value).toLocaleString("en") : Number(value.toPrecision(value < 0.1 ? 2 : 3)).toString());
const threeDigits = (value) => (!Number.isFinite(value) || Math.abs(value) >= 100 || value === 0 ? shortest(value) : value.toPrecision(3));
const percentage = (value) => (Number.isFinite(value) ? `${(100 * value).toFixed(0)} %` : "–");

// Round numbers from low to high, about `most` of them.
function ticksOf(low, high, most = 4) {
  const raw = (high - low) / most, size = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 2.5, 5, 10].map((times) => size * times).find((each) => each >= raw * 0.999);
  const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
  return range(Math.max(0, last - first + 1)).map((place) => Number(((first + place) * step).toPrecision(10)));
}

// The numbers of `data`: the steps, then each curve.
class Numbers {
  constructor(model) {
    const numbers = new Float32Array(bytesOf(model.get("data")).slice().buffer); // a copy of its own lies where 32-bit numbers may
    this.curves = model.get("curves").map(([panel, name, kind, expert, colour], place) => ({ panel, name, kind, expert, colour, place }));
    this.points = Math.floor(numbers.length / (this.curves.length + 1));
    const column = (place) => Array.from(numbers.subarray(place * this.points, (place + 1) * this.points));
    this.steps = column(0);
    for (const curve of this.curves) curve.values = column(curve.place + 1);
    this.experts = 1 + this.curves.reduce((most, curve) => Math.max(most, curve.panel === "p" ? curve.expert : -1), -1);
  }

  // The curves of a panel; preferences of one expert, or (-1) their mean over the experts.
  of(panel, expert) {
    const all = this.curves.filter((curve) => curve.panel === panel);
    if (panel !== "p") return all;
    if (expert >= 0) return all.filter((curve) => curve.expert === expert);
    const names = [...new Set(all.map((curve) => curve.name))];
    return names.map((name) => {
      const alike = all.filter((curve) => curve.name === name);
      return { ...alike[0], values: range(this.points).map((point) => alike.reduce((sum, curve) => sum + curve.values[point], 0) / alike.length) };
    });
  }

  // The first step that the filter weighs, where it is not the first of all.
  get filterStart() {
    const share = this.curves.find((curve) => curve.kind === "share"), first = share ? share.values.findIndex((value) => value > 0) : -1;
    return first > 0 ? this.steps[first] : null;
  }

  // The point that is nearest to a step.
  nearest(step) { return this.steps.reduce((best, each, point) => (Math.abs(each - step) < Math.abs(this.steps[best] - step) ? point : best), 0); }

  stepWords(point) {
    const from = point ? this.steps[point - 1] + 1 : this.steps[0], to = this.steps[point];
    return this.points < 2 || from >= to ? `step ${to}` : `steps ${from} to ${to}, mean`;
  }
}

// One panel: a title, the curves, and a legend of switches with the values at the step that is pointed at.
class Panel {
  constructor(key, title, about, view) {
    Object.assign(this, { key, title, view, lines: new Map(), switches: new Map() });
    [this.format, this.written] = key === "load" ? [percentage, percentage] : [shortest, threeDigits]; // of the axis, and beside the names
    this.grid = draw("g", { class: "m2t-grid" });
    this.paths = draw("g", { class: "m2t-paths" });
    this.cursor = draw("line", { class: "m2t-cursor", y1: EDGE.top, y2: HEIGHT - EDGE.bottom });
    this.dots = draw("g");
    this.picture = draw("svg", { role: "slider", tabindex: 0, "aria-label": `${title}: step`, "data-lm-suppress-shortcuts": "true", height: HEIGHT }, this.grid, this.paths, this.cursor, this.dots);
    this.picture.addEventListener("pointermove", (event) => view.point(this.nearest(event.clientX - this.picture.getBoundingClientRect().left)));
    this.picture.addEventListener("pointerdown", (event) => view.point(this.nearest(event.clientX - this.picture.getBoundingClientRect().left)));
    this.picture.addEventListener("pointerleave", () => view.point(null));
    this.picture.addEventListener("blur", () => view.point(null));
    this.picture.addEventListener("keydown", (event) => this.onKey(event));
    this.legend = make("div", { class: "m2t-legend", role: "group", "aria-label": `${title}: curves that are shown` });
    this.choice = key === "p" ? make("select", { "aria-label": "preferences of which expert", onchange: () => view.put("expert", Number(this.choice.value)) }) : null;
    this.empty = make("p", { class: "m2t-soft" }, about);
    this.root = make("section", { class: "m2t-panel", "data-panel": key, "aria-label": title }, make("div", { class: "m2t-head" }, make("h4", {}, title), ...(this.choice ? [this.choice] : [])), this.empty, this.picture, this.legend);
  }

  nearest(x) {
    const { numbers } = this.view, wide = this.axis;
    if (!numbers.points || !wide) return null;
    return numbers.nearest(wide.low + ((x - EDGE.left) / (wide.right - EDGE.left)) * (wide.high - wide.low));
  }

  onKey(event) {
    const last = this.view.numbers.points - 1, now = this.view.at ?? last, moves = { ArrowLeft: now - 1, ArrowRight: now + 1, ArrowDown: now - 1, ArrowUp: now + 1, PageDown: now - 10, PageUp: now + 10, Home: 0, End: last };
    if (event.key === "Escape") this.view.point(null);
    else if (event.key in moves && last >= 0) this.view.point(Math.min(last, Math.max(0, moves[event.key])));
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  // What changes with the numbers: curves, axes, legend.
  draw(width) {
    const { numbers, expert } = this.view;
    if (this.choice) this.fillChoice(numbers.experts, expert);
    this.curves = numbers.of(this.key, expert).filter((curve) => curve.values.some(Number.isFinite));
    const none = !this.curves.length;
    this.empty.hidden = !none;
    this.picture.toggleAttribute("hidden", none);
    this.legend.hidden = none;
    if (this.choice) this.choice.hidden = none || numbers.experts < 2;
    this.root.classList.toggle("m2t-none", none);
    if (none) return;
    const shown = this.curves.filter((curve) => this.view.isShown(curve));
    this.setAxes(shown, width);
    this.drawGrid();
    this.drawCurves(shown);
    this.drawLegend();
    this.tell();
  }

  fillChoice(count, expert) {
    if (this.choice.options.length !== count + 1) this.choice.replaceChildren(make("option", { value: -1 }, "mean of the experts"), ...range(count).map((z) => make("option", { value: z }, `expert ${z}`)));
    this.choice.value = expert < count ? expert : -1;
  }

  setAxes(shown, width) {
    const { steps } = this.view.numbers;
    let low = Infinity, high = -Infinity;
    for (const curve of shown) for (const value of curve.values) { if (value < low) low = value; if (value > high) high = value; }
    if (low > high || ["recall", "phi"].includes(this.key)) [low, high] = [0, 1];
    else if (low < 0.35 * high) low = Math.min(low, 0);
    if (high - low < 1e-9) [low, high] = [low - 0.5, high + 0.5];
    const ticks = ticksOf(low, high), step = ticks.length > 1 ? ticks[1] - ticks[0] : high - low;
    [low, high] = [Math.floor(low / step + 1e-9) * step, Math.ceil(high / step - 1e-9) * step];
    this.axis = { low: steps[0], high: steps[steps.length - 1], right: width - EDGE.right };
    const wide = this.axis.high - this.axis.low || 1;
    this.x = (at) => EDGE.left + ((at - this.axis.low) / wide) * (this.axis.right - EDGE.left);
    this.y = (value) => HEIGHT - EDGE.bottom - ((value - low) / (high - low)) * (HEIGHT - EDGE.bottom - EDGE.top);
    Object.assign(this, { low, high });
    this.picture.setAttribute("width", width);
    this.picture.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  }

  drawGrid() {
    const { numbers } = this.view, right = this.axis.right, bottom = HEIGHT - EDGE.bottom, marks = [];
    for (const value of ticksOf(this.low, this.high)) {
      const y = this.y(value);
      marks.push(draw("line", { x1: EDGE.left, x2: right, y1: y, y2: y }), draw("text", { x: EDGE.left - 6, y: y + 4, "text-anchor": "end" }, this.format(value)));
    }
    for (const step of ticksOf(this.axis.low, this.axis.high, Math.max(2, (right - EDGE.left) / 90)).filter(Number.isInteger)) marks.push(draw("text", { x: this.x(step), y: bottom + 15, "text-anchor": "middle" }, step.toLocaleString("en")));
    const even = this.even();
    if (even !== null && even >= this.low && even <= this.high) marks.push(draw("line", { class: "m2t-even", x1: EDGE.left, x2: right, y1: this.y(even), y2: this.y(even) }), draw("text", { x: right, y: this.y(even) - 4, "text-anchor": "end" }, "even"));
    const start = ["loss", "phi"].includes(this.key) ? numbers.filterStart : null;
    if (start !== null) marks.push(draw("line", { class: "m2t-even", x1: this.x(start), x2: this.x(start), y1: EDGE.top, y2: bottom }), draw("text", { x: this.x(start) + 4, y: EDGE.top + 9 }, "filter starts"));
    this.grid.replaceChildren(...marks);
  }

  // An even share: of the objectives, or of the experts.
  even() { return ["omega", "p", "load"].includes(this.key) ? 1 / new Set(this.curves.map((curve) => curve.name)).size : null; }

  drawCurves(shown) {
    const at = this.view.numbers.steps.map((step) => Math.round(10 * this.x(step)) / 10), kept = new Set(shown.map((curve) => this.idOf(curve)));
    for (const [id, path] of this.lines) if (!kept.has(id)) { path.remove(); this.lines.delete(id); }
    for (const curve of shown) {
      const id = this.idOf(curve);
      let path = this.lines.get(id);
      if (!path) { path = draw("path", { class: `m2t-curve m2t-c${curve.colour} ${SOLID.includes(curve.kind) ? "" : "m2t-other"}`, "data-name": curve.name, "data-kind": curve.kind }); this.lines.set(id, path); this.paths.append(path); }
      const known = [];
      curve.values.forEach((value, point) => { if (Number.isFinite(value)) known.push(`${at[point]} ${Math.round(10 * this.y(value)) / 10}`); });
      const few = known.length <= 12; // then each number is a point, too
      path.setAttribute("d", `M${known.join("L")}${few ? known.map((place) => `M${place}h.01`).join("") : ""}`);
      path.classList.toggle("m2t-few", few);
    }
    this.shown = shown;
  }

  idOf(curve) { return `${curve.name} ${curve.kind}`; }

  drawLegend() {
    const names = [...new Map(this.curves.map((curve) => [curve.name, curve])).values()], kinds = [...new Set(this.curves.map((curve) => curve.kind))];
    const wanted = [...names.map((curve) => ["name", curve.name, curve.colour]), ...(kinds.length > 1 && ["loss", "load"].includes(this.key) ? kinds.map((kind) => ["kind", kind, kind]) : [])];
    if (this.entries !== JSON.stringify(wanted)) {
      this.entries = JSON.stringify(wanted);
      this.switches.clear();
      this.legend.replaceChildren(...wanted.map(([what, name, look]) => {
        const value = make("span", { class: "m2t-value" }), key = `${what} ${name}`, other = what === "kind" && !SOLID.includes(name);
        const swatch = draw("svg", { width: 22, height: 10, viewBox: "0 0 22 10", "aria-hidden": "true" }, draw("path", { class: `m2t-curve m2t-c${what === "kind" ? "kind" : look} ${other ? "m2t-other" : ""}`, d: "M1 5H21" }));
        const button = make("button", { type: "button", "data-key": key, onclick: () => this.view.toggle(key) }, swatch, make("bdi", {}, name), value);
        this.switches.set(key, { button, value, name, what });
        return button;
      }));
    }
    for (const [key, { button }] of this.switches) button.setAttribute("aria-pressed", String(!this.view.hidden.includes(key)));
  }

  // What changes with the step that is pointed at: cursor, dots, values.
  tell() {
    const { numbers, at } = this.view;
    if (!numbers.points || !this.curves?.length || !this.x) return;
    const point = at ?? numbers.points - 1, x = this.x(numbers.steps[point]), words = [];
    this.cursor.toggleAttribute("hidden", at === null);
    this.cursor.setAttribute("x1", x);
    this.cursor.setAttribute("x2", x);
    this.dots.replaceChildren(...(at === null ? [] : this.shown.filter((curve) => Number.isFinite(curve.values[point])).map((curve) => draw("circle", { class: `m2t-dot m2t-c${curve.colour}`, cx: x, cy: this.y(curve.values[point]), r: 2.8 }))));
    for (const { value, name, what } of this.switches.values()) {
      if (what === "kind") { value.textContent = SOLID.includes(name) ? "" : "(in brackets)"; continue; }
      const [first, ...others] = this.curves.filter((curve) => curve.name === name), text = [this.written(valueAt(first, point, at)), ...others.map((curve) => `(${this.written(valueAt(curve, point, at))})`)].join(" ");
      value.textContent = text;
      if (this.shown.some((curve) => curve.name === name)) words.push(`${name} ${text}`);
    }
    const step = numbers.stepWords(point);
    for (const [name, value] of [["aria-valuemin", numbers.steps[0]], ["aria-valuemax", numbers.steps[numbers.points - 1]], ["aria-valuenow", numbers.steps[point]], ["aria-valuetext", `${step}: ${words.join(", ")}`]]) this.picture.setAttribute(name, value);
  }
}

// The value at a point. Recall is measured now and then: there it is the last that was known by then, as in every panel while no step is pointed at.
function valueAt(curve, point, at) {
  if ((at !== null && curve.panel !== "recall") || Number.isFinite(curve.values[point])) return curve.values[point];
  return curve.values.slice(0, point + 1).reduce((last, value) => (Number.isFinite(value) ? value : last), NaN);
}

function render({ model, el }) {
  const put = (name, value) => { model.set(name, value); model.save_changes(); };
  const view = { numbers: new Numbers(model), at: null, put, hidden: [], expert: -1 };
  view.isShown = (curve) => !view.hidden.includes(`name ${curve.name}`) && !view.hidden.includes(`kind ${curve.kind}`);
  view.toggle = (key) => put("hidden", view.hidden.includes(key) ? view.hidden.filter((each) => each !== key) : [...view.hidden, key]);
  const panels = model.get("panels").map(([key, title, about]) => new Panel(key, title, about, view));
  const where = make("p", { class: "m2t-where" }), all = make("button", { type: "button", class: "m2t-all", onclick: () => put("hidden", []) }, "show all curves");
  const root = make("div", { class: "m2t", role: "group", "aria-label": "curves of the run", "data-lm-suppress-shortcuts": "true" }, make("div", { class: "m2t-head" }, where, all), make("div", { class: "m2t-panels" }, ...panels.map((panel) => panel.root)));
  const say = () => {
    const { numbers, at } = view;
    where.textContent = !numbers.points ? "No step has been taken yet." : at === null ? `Values of the last step, ${numbers.steps[numbers.points - 1]}. Point at a curve, or use the arrow keys, for those of another.` : `Values of ${numbers.stepWords(at)}.`;
  };
  view.point = (at) => {
    if (at === view.at) return;
    view.at = at;
    say();
    for (const panel of panels) panel.tell();
  };
  const redraw = () => {
    const step = view.at === null ? null : view.numbers.steps[view.at];
    view.numbers = new Numbers(model);
    view.at = step === null || !view.numbers.points ? null : view.numbers.nearest(step);
    view.hidden = model.get("hidden");
    view.expert = model.get("expert");
    all.hidden = !view.hidden.length;
    say();
    const wide = Math.max(220, ...panels.map((panel) => Math.floor(panel.root.clientWidth))); // asked before anything is drawn; all have the same
    for (const panel of panels) panel.draw(wide);
  };
  let asked = 0;
  const soon = () => { cancelAnimationFrame(asked); asked = requestAnimationFrame(redraw); };
  const sized = new ResizeObserver(soon);
  el.append(root);
  sized.observe(root);
  const traits = ["data", "curves", "hidden", "expert"];
  for (const name of traits) model.on(`change:${name}`, soon);
  redraw();
  return () => {
    cancelAnimationFrame(asked);
    sized.disconnect();
    for (const name of traits) model.off(`change:${name}`, soon);
  };
}

export default { render };
