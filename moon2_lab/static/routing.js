// Inside the experts: which expert took which cell and word, the load by view, preferences and objective weights over a run.
// It draws what it is given and asks nothing of the network. Titles are put in as text, never as HTML.

const TRAITS = ["layer", "expert", "step"];
const COLOURS = 8; // --e0 to --e7 of the style; the number of the expert stands beside its colour, always
const percent = (value, digits = 0) => (value === null ? "–" : `${(100 * value).toFixed(digits)} %`);
const largest = (values) => values.flat(Infinity).reduce((most, value) => Math.max(most, value ?? 0), 0);
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

// Views that are there, in the order of the reports: a saved notebook sorts the keys of its state.
const inOrder = (byView) => ["t", "i", "mm"].filter((view) => view in byView);

// The colour of an expert and the ink that can be read on it.
function inColour(element, expert) {
  element.style.setProperty("--c", expert < 0 ? "" : `var(--e${expert % COLOURS})`);
  element.style.setProperty("--i", expert < 0 ? "" : `var(--i${expert % COLOURS})`);
  return element;
}

const chip = (expert) => inColour(make("span", { class: "m2r-chip", "aria-hidden": "true" }, String(expert)), expert);

// Experts with their shares as bars; the dashed line is an even share.
function bars(list, values, most, digits = 0) {
  const rows = values.map((value, expert) => {
    const track = make("span", { class: "m2r-track", "aria-hidden": "true" }, inColour(make("span", { class: "m2r-fill" }), expert), make("span", { class: "m2r-even" }));
    track.style.setProperty("--w", Math.min(1, (value ?? 0) / most));
    track.style.setProperty("--even", 1 / values.length / most);
    return make("li", {}, make("span", { class: "m2r-unseen" }, `expert ${expert}: `), chip(expert), track, make("span", { class: "m2r-value" }, percent(value, digits)));
  });
  list.replaceChildren(...rows);
}

// A table of coloured numbers: one row for each expert.
function table(caption, columns, rows, most, digits) {
  const head = make("tr", {}, make("th", { scope: "col" }, "expert"), ...columns.map(([name, title]) => make("th", { scope: "col", title }, name)));
  const body = rows.map((values, expert) => make("tr", {}, make("th", { scope: "row" }, chip(expert), make("span", { class: "m2r-unseen" }, `expert ${expert}`)), ...values.map((value) => {
    const cell = make("td", {}, value === null ? "–" : value.toFixed(digits));
    cell.style.setProperty("--w", most > 0 ? (value ?? 0) / most : 0);
    return cell;
  })));
  return make("table", {}, make("caption", {}, caption), make("thead", {}, head), make("tbody", {}, ...body));
}

// The item: its picture with cells, its title as words, and the weights of what is pointed at.
class Item extends Pointing {
  constructor(model, say) {
    super({ model, say });
    this.part = model.get("payload").side;
    const bytes = bytesOf(model.get("data"));
    [this.layers, this.places, this.experts] = this.part.experts.shape;
    this.numbers = new DataView(bytes.buffer, bytes.byteOffset + this.part.experts.at, 2 * this.layers * this.places * this.experts);
    this.told = make("p", { class: "m2r-told" });
    this.list = make("ul", { class: "m2r-bars", role: "list" });
    this.whose = make("h4");
    this.legend = make("p", { class: "m2r-note" });
    const side = make("div", { class: "m2r-weights" }, this.whose, this.list, this.legend);
    this.root = this.hear(make("section", { class: "m2r-item", "aria-label": "the item, its cells and words" }, make("div", { class: "m2r-seen" }, this.picture(bytes), this.title(), this.told), side));
  }

  announce() { this.say(this.told.textContent); }

  picture(bytes) {
    if (!cellsOf(this.part)) return make("p", { class: "m2r-none" }, "This item has no picture.");
    const [rows, columns] = gridOf(this.part), frame = make("div", { class: "m2r-picture" });
    frame.style.setProperty("--rows", rows);
    frame.style.setProperty("--columns", columns);
    if (this.part.image) {
      this.address = URL.createObjectURL(new Blob([bytes.slice(this.part.image.at, this.part.image.at + this.part.image.size)], { type: "image/jpeg" }));
      takeAspect(frame, this.part.image.aspect);
      frame.append(make("img", { src: this.address, alt: "", draggable: "false" }));
    }
    const cells = make("div", { class: "m2r-cells", role: "grid", "aria-label": `cells of the picture, ${rows} by ${columns}; arrow keys move` });
    for (const row of range(rows)) {
      const line = make("div", { role: "row" });
      for (const column of range(columns)) line.append(this.target("cell", row * columns + column, make("div", { role: "gridcell", class: "m2r-cell" }, make("span", { class: "m2r-chip" }))));
      cells.append(line);
    }
    frame.append(cells);
    return frame;
  }

  title() {
    if (!this.part.words.length) return make("p", { class: "m2r-none" }, this.part.text ? "No word of this title is read." : "This item has no title.");
    const list = make("p", { class: "m2r-title", role: "listbox", "aria-orientation": "horizontal", "aria-label": "words of the title; arrow keys move" });
    this.part.words.forEach(([gap, word], place) => list.append(gap, this.target("word", place, make("span", { role: "option", class: "m2r-word", "aria-selected": "false" }, make("bdi", {}, word), make("span", { class: "m2r-chip" })))));
    if (this.part.tail) list.append(make("span", { class: "m2r-tail", title: "not read by the model" }, this.part.tail));
    return list;
  }

  // Z weights of a place in the chosen layer; cells come first.
  weights(place) {
    const from = (this.model.get("layer") * this.places + place) * this.experts;
    return range(this.experts).map((expert) => this.numbers.getUint16(2 * (from + expert), true) / 65535);
  }

  placeOf(kind, place) { return kind === "cell" ? place : cellsOf(this.part) + place; }

  draw() {
    const expert = this.model.get("expert"), layer = this.model.get("layer"), all = range(this.places).map((place) => this.weights(place));
    const most = expert === null ? 1 : largest(all.map((weights) => weights[expert]));
    for (const [kind, elements] of [["cell", this.cells], ["word", this.words]]) {
      elements.forEach((element, place) => {
        const at = this.placeOf(kind, place), weights = all[at], best = this.part.strongest[layer][at], mark = element.querySelector(".m2r-chip");
        const shown = expert === null ? best : expert, weight = shown < 0 ? 0 : weights[shown];
        inColour(element, shown);
        if (expert !== null) element.style.setProperty("--c", "var(--share)");
        element.style.setProperty("--w", most > 0 ? (weight / most).toFixed(4) : 0);
        mark.textContent = expert === null ? (best < 0 ? "=" : String(best)) : (100 * weight).toFixed(0);
        mark.classList.toggle("m2r-plain", expert !== null || best < 0);
        const told = this.inWords(weights, best);
        element.title = told;
        element.setAttribute("aria-label", `${this.nameOf(kind, place)}: ${expert === null ? told : `expert ${expert} ${percent(weights[expert], 1)}`}`);
        const here = this.is(kind, place);
        element.classList.toggle("m2r-here", here);
        element.classList.toggle("m2r-pinned", here && this.pinned);
        if (kind === "word") element.setAttribute("aria-selected", String(here));
        element.tabIndex = here || (place === 0 && !(this.active && this.active.kind === kind)) ? 0 : -1;
      });
    }
    this.tell(all);
  }

  inWords(weights, best) {
    const order = range(this.experts).filter((expert) => weights[expert] > 0).sort((a, b) => weights[b] - weights[a]).slice(0, 3);
    return (best < 0 ? "even: " : "") + order.map((expert) => `expert ${expert} ${percent(weights[expert], 1)}`).join(", ");
  }

  tell(all) {
    const layer = this.model.get("layer"), expert = this.model.get("expert"), words = this.words.length, cells = this.cells.length;
    let shown, name;
    if (this.active) {
      const { kind, place } = this.active, at = this.placeOf(kind, place);
      [shown, name] = [all[at], this.nameOf(kind, place)];
      this.told.textContent = `${name}: ${this.inWords(shown, this.part.strongest[layer][at])}.`;
    } else {
      shown = range(this.experts).map((z) => all.reduce((sum, weights) => sum + weights[z], 0) / this.places);
      name = `Mean over ${[cells && plural(cells, "cell"), words && plural(words, "word")].filter(Boolean).join(" and ")}`;
      this.told.textContent = "Point at a cell or a word, or move with tab and arrow keys.";
    }
    this.whose.replaceChildren("Weights: ", make("bdi", {}, name));
    bars(this.list, shown, Math.max(1e-9, largest(shown), 1.5 / this.experts), 1);
    const mode = expert === null ? "Colour and number: the expert with the largest weight; the stronger the colour, the larger its weight. “=” stands where no expert is ahead." : `Colour and number: weight of expert ${expert}, in percent.`;
    this.legend.textContent = `${mode} Dashed: an even share, ${percent(1 / this.experts, 1)}.${this.part.unread ? ` The last ${this.part.unread === 1 ? "word was" : `${this.part.unread} words were`} not read.` : ""}`;
  }
}

// Load by view in the chosen layer.
class Load {
  constructor(model) {
    this.model = model;
    this.load = model.get("payload").load;
    this.views = inOrder(this.load);
    this.most = Math.max(1e-9, 1.05 * largest(Object.values(this.load)));
    this.lists = this.views.map((view) => make("ul", { class: "m2r-bars", role: "list", "data-view": view, "aria-label": `load, ${model.get("payload").views[view]}` }));
    this.heading = make("h3");
    const panels = this.views.map((view, place) => make("div", {}, make("h4", {}, model.get("payload").views[view]), this.lists[place]));
    const body = this.views.length ? make("div", { class: "m2r-panels" }, ...panels) : make("p", { class: "m2r-none" }, "No load by view was given: moon2_lab.routing.expert_load makes it.");
    this.root = make("section", { class: "m2r-load", "aria-label": "load by view" }, this.heading, body);
    if (this.views.length) this.root.append(make("p", { class: "m2r-note" }, "Share of the choices that each expert got, over many items. Dashed: an even share."));
  }

  draw(layerName) {
    this.heading.textContent = this.views.length ? `Load by view, ${layerName}` : "Load by view";
    this.views.forEach((view, place) => bars(this.lists[place], this.load[view][this.model.get("layer")], this.most, 1));
  }
}

// Preferences, objective weights and mean routing weights at a step of the run.
class Course {
  constructor(model, say, put) {
    Object.assign(this, { model, say });
    const payload = model.get("payload"), run = payload.training;
    this.run = run;
    this.root = make("section", { class: "m2r-course", "aria-label": "over training" }, make("h3", {}, "Over training"));
    if (!run) { this.root.append(make("p", { class: "m2r-none" }, "No training history was given.")); return; }
    this.objectives = payload.objectives.map((name) => [name, payload.objective_words[name]]);
    this.rule = payload.omega_rule;
    this.slider = make("input", { type: "range", min: 0, max: run.steps.length - 1, step: 1, oninput: () => put("step", run.steps[Number(this.slider.value)]) });
    this.output = make("output");
    this.alarm = make("div", { role: "alert" });
    this.body = make("div", { class: "m2r-panels" });
    this.most = { preference: largest(run.preference ?? []), weights: largest(Object.values(run.weights)), omega: Math.max(0.4, 1.05 * largest(run.omega ?? [])) };
    this.root.append(make("label", { "data-control": "step" }, make("span", {}, "step"), this.slider, this.output), this.alarm, this.body);
    if (run.alarms.length) this.root.append(make("h4", {}, "In the whole run"));
    for (const [level, text] of run.alarms) this.root.append(make("p", { class: level === "warning" ? "m2r-warning" : "m2r-note" }, level === "warning" ? "⚠ " : "", text));
  }

  draw() {
    const run = this.run;
    if (!run) return;
    const at = run.steps.indexOf(this.model.get("step")), last = run.steps[run.steps.length - 1], words = `step ${run.steps[at]} of ${last}`;
    this.slider.value = at;
    this.output.textContent = words;
    this.slider.setAttribute("aria-valuetext", words);
    const views = inOrder(run.weights), payload = this.model.get("payload");
    const none = (what) => make("p", { class: "m2r-none" }, `This history holds no ${what}.`);
    const preference = run.preference ? table("Preference p (rows sum to 1)", this.objectives, run.preference[at], this.most.preference, 2) : none("preferences p");
    const experts = views.length ? run.weights[views[0]][at].length : 0;
    const went = views.length ? table("Mean routing weight in the batch, by view", views.map((view) => [view, payload.views[view]]), range(experts).map((z) => views.map((view) => run.weights[view][at][z])), this.most.weights, 2) : none("routing weights by view");
    this.body.replaceChildren(make("div", { class: "m2r-scroll", tabindex: 0, role: "region", "aria-label": "preferences" }, preference), this.omegas(at, none), make("div", { class: "m2r-scroll", tabindex: 0, role: "region", "aria-label": "routing weights by view" }, went));
    this.warn(at);
  }

  omegas(at, none) {
    const run = this.run;
    if (!run.omega) return none("objective weights omega");
    const rows = run.omega[at].map((value, place) => {
      const track = make("span", { class: "m2r-track", "aria-hidden": "true" }, make("span", { class: "m2r-fill" }), make("span", { class: "m2r-even" }));
      track.style.setProperty("--w", (value ?? 0) / this.most.omega);
      track.style.setProperty("--even", 1 / this.objectives.length / this.most.omega);
      return make("li", { title: this.objectives[place][1] }, make("span", { class: "m2r-objective" }, this.objectives[place][0]), track, make("span", { class: "m2r-value" }, value === null ? "–" : value.toFixed(3)));
    });
    const total = run.total?.[at] ?? null;
    return make("div", { class: "m2r-omega" }, make("h4", {}, "Objective weights ω"), make("ul", { class: "m2r-bars m2r-wide", role: "list" }, ...rows),
      make("p", { class: "m2r-note" }, `Dashed: an even weight, ${Number((1 / this.objectives.length).toFixed(2))}. Sum of ω as printed in the paper: ${total === null ? "unknown" : total.toFixed(2)}.`));
  }

  warn(at) {
    const omega = this.run.omega?.[at] ?? [], sum = omega.reduce((all, value) => all + (value ?? 0), 0), total = this.run.total?.[at] ?? null, lines = [];
    omega.forEach((value, place) => { if (sum > 0 && value / sum > this.rule.largest_share) lines.push(`${this.objectives[place][0]} holds ${percent(value / sum)} of the objective weight at this step: one objective takes over.`); });
    if (total !== null && total < this.rule.smallest_sum) lines.push(`The objective weights sum to ${total.toFixed(2)} at this step: the router escapes the objectives.`);
    if (this.shown === lines.join()) return;
    this.shown = lines.join();
    this.alarm.replaceChildren(...lines.map((line) => make("p", { class: "m2r-warning" }, make("b", { "aria-hidden": "true" }, "⚠ "), line)));
  }
}

function render({ model, el }) {
  const payload = model.get("payload"), part = payload.side, [layers, , experts] = part.experts.shape;
  const live = make("p", { class: "m2r-unseen", role: "status", "aria-live": "polite" });
  const say = (words) => { live.textContent = words; };
  const put = (name, value) => { model.set(name, value); model.save_changes(); };
  const item = new Item(model, say), load = new Load(model), course = new Course(model, say, put);
  const layerName = () => `layer ${part.expert_layers[model.get("layer")]}`;
  const slider = make("input", { type: "range", min: 0, max: layers - 1, step: 1, oninput: () => put("layer", Number(slider.value)) }), output = make("output");
  const list = make("select", { onchange: () => put("expert", list.value === "" ? null : Number(list.value)) }, make("option", { value: "" }, "strongest expert"), ...range(experts).map((z) => make("option", { value: z }, `weight of expert ${z}`)));
  const controls = make("div", { class: "m2r-controls", role: "group", "aria-label": "what is shown" },
    make("label", { "data-control": "MoE layer", hidden: layers < 2 }, make("span", {}, "MoE layer"), slider, output), make("label", { "data-control": "colour" }, make("span", {}, "colour"), list));
  const heading = make("p", { class: "m2r-heading" }, make("b", {}, "Inside the experts"), ` · ${plural(experts, "expert")}, ${plural(layers, "MoE layer")}`, ...(part.id ? [" · ", make("bdi", {}, part.id)] : []));
  el.append(make("div", { class: "m2r", "data-lm-suppress-shortcuts": "true" }, heading, controls, item.root, load.root, course.root, live));
  const draw = () => {
    slider.value = model.get("layer");
    output.textContent = layerName();
    slider.setAttribute("aria-valuetext", layerName());
    list.value = model.get("expert") ?? "";
    item.draw(); load.draw(layerName()); course.draw();
  };
  let asked = 0;
  const soon = () => { cancelAnimationFrame(asked); asked = requestAnimationFrame(draw); };
  for (const name of TRAITS) model.on(`change:${name}`, soon);
  draw();
  return () => {
    cancelAnimationFrame(asked);
    for (const name of TRAITS) model.off(`change:${name}`, soon);
    if (item.address) URL.revokeObjectURL(item.address);
  };
}

export default { render };
