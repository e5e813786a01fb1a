// The pair heatmap. One file for two places: the notebook widget (anywidget calls render) and the self-contained page (a model that lives in the page).
// It draws what it is given and asks nothing of the network. Titles are put in as text, never as HTML.

const SIDES = ["query", "item"];
const TRAITS = ["payload", "data", "found", "offered", "method", "side", "layer", "head", "expert", "moe_layer", "opacity", "job"];

const largest = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);

function written(value, signed, most) {
  if (!signed) return `${(100 * value).toFixed(most >= 0.1 ? 1 : 2)} %`;
  const digits = most > 0 ? Math.min(8, Math.max(3, 2 - Math.floor(Math.log10(most)))) : 3;
  return (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);
}

// Places in a block of the chosen layers and heads (null: all of them).
function placesOf(block, layer, head) {
  const [layers, heads] = block.shape;
  const chosen = (place, all) => (place === null || all === 1 ? range(all) : [place]);
  return chosen(layer, layers).flatMap((l) => chosen(head, heads).map((h) => l * heads + h));
}

// Every step-th number of a block from start on, averaged over the chosen layers and heads (null: all of them).
function numbers(bytes, block, layer, head, start, step, count) {
  const stride = block.stride, found = new Float64Array(count), over = placesOf(block, layer, head);
  for (const place of over) {
    const from = block.at + place * stride + start, unit = block.scales[place] / 255 / over.length;
    for (let k = 0; k < count; k++) found[k] += bytes[from + k * step] * unit;
  }
  return Array.from(found);
}

// What layer and head a block really gives: a block may hold averages only.
function placeWords(block, part, layer, head) {
  const [layers, heads] = block.shape;
  const layerWords = layer === null || layers === 1 ? (layers === 1 && !block.averaged ? part.layer_names[0] : "all layers") : part.layer_names[layer] ?? `layer ${layer}`;
  return `${layerWords}, ${head === null || heads === 1 ? (heads === 1 && !block.averaged ? "its one head" : "all heads") : `head ${head}`}`;
}

// What share of the attention of the chosen layers and heads went to tokens of a frame, in words; empty where there is none.
function outsideWords(block, layer, head) {
  if (!block.outside) return "";
  const over = placesOf(block, layer, head), share = over.reduce((sum, place) => sum + block.outside[place], 0) / over.length;
  return `${(100 * share).toFixed(0)} % of it went to the frame of the row, which is in no map.`;
}

// The map to be drawn on one side: { cells, words, signed, most, title, faith } or null where there is none.
function chosenMap(model, side) {
  const part = model.get("payload").sides[side], bytes = bytesOf(model.get("data")), patches = cellsOf(part), count = patches + part.words.length;
  const get = (name) => model.get(name);
  const cut = (values, rest) => ({ cells: patches ? values.slice(0, patches) : null, words: values.slice(patches), most: largest(values), signed: false, ...rest });
  if (get("expert") !== null) {
    if (!part.experts) return null;
    const block = part.experts, layer = block.shape[0] === 1 ? 0 : get("moe_layer");
    const where = block.averaged ? "mean over the MoE layers" : `layer ${part.expert_layers[layer] ?? layer}`;
    return cut(numbers(bytes, block, layer, null, get("expert"), block.experts, count), { title: `routing weight of expert ${get("expert")}, ${where}`, single: true });
  }
  const method = get("method"), whole = get("layer") === null && get("head") === null, map = (get("found")[side] ?? {})[method];
  if (method === "attention" && part.pooled && (!whole || !map)) {
    return cut(numbers(bytes, part.pooled, get("layer"), get("head"), 0, 1, count), { title: `attention, ${placeWords(part.pooled, part, get("layer"), get("head"))}`, single: true, note: outsideWords(part.pooled, get("layer"), get("head")) });
  }
  if (!map) return null;
  const all = [...(map.cells ?? []), ...map.words];
  return { cells: map.cells, words: map.words, signed: map.signed, most: largest(all), title: get("payload").names[method] ?? method, note: map.note, faith: map.faith, tried: map.tried, method };
}

// Attention between one word and all cells, or one cell and all words.
function linksOf(model, side, kind, place) {
  const part = model.get("payload").sides[side], block = part.links, cells = cellsOf(part);
  if (!block) return null;
  const [start, step, count] = kind === "word" ? [place * cells, 1, cells] : [place, cells, part.words.length];
  const values = numbers(bytesOf(model.get("data")), block, model.get("layer"), model.get("head"), start, step, count);
  return { values, most: largest(values), where: placeWords(block, part, model.get("layer"), model.get("head")) };
}

function paint(element, value, most, signed, strongest) {
  const strength = most > 0 ? Math.min(1, Math.abs(value) / most) : 0;
  const colour = signed ? (value > 0 ? "--for" : "--against") : "--share";
  element.style.backgroundColor = strength > 0 ? `rgb(var(${colour}) / ${(strongest * strength).toFixed(3)})` : "";
}

// One side: its picture with cells, its title as words, a legend, a line of numbers and the line about faithfulness.
class Side extends Pointing {
  constructor(model, name, say) {
    super({ model, name, say });
    this.part = model.get("payload").sides[name];
    this.told = make("p", { class: "m2h-told" });
    this.legend = make("div", { class: "m2h-legend" });
    this.trust = make("div", { class: "m2h-trust" });
    this.root = this.hear(make("section", { class: "m2h-side", "data-side": name, "aria-label": `${name} of the pair` },
      make("h3", {}, make("span", {}, name), make("bdi", { class: "m2h-id" }, this.part.id)), this.picture(), this.title(), this.legend, this.told, this.trust));
  }

  announce() { this.say(`${this.name}: ${this.told.textContent}`); }

  picture() {
    if (!cellsOf(this.part)) return make("p", { class: "m2h-none" }, "This side has no picture.");
    const [rows, columns] = gridOf(this.part), frame = make("div", { class: "m2h-picture" });
    if (this.part.image) {
      const bytes = bytesOf(this.model.get("data")).slice(this.part.image.at, this.part.image.at + this.part.image.size);
      this.address = URL.createObjectURL(new Blob([bytes], { type: "image/jpeg" }));
      takeAspect(frame, this.part.image.aspect);
      frame.append(make("img", { src: this.address, alt: "", draggable: "false" }));
    }
    const table = make("div", { class: "m2h-cells", role: "grid", "aria-label": `cells of the ${this.name}'s picture, ${rows} by ${columns}; arrow keys move` });
    table.style.setProperty("--rows", rows);
    table.style.setProperty("--columns", columns);
    for (const row of range(rows)) {
      const line = make("div", { role: "row" });
      for (const column of range(columns)) line.append(this.target("cell", row * columns + column, make("div", { role: "gridcell", class: "m2h-cell" })));
      table.append(line);
    }
    frame.append(table);
    return frame;
  }

  title() {
    if (!this.part.words.length) return make("p", { class: "m2h-none" }, this.part.text ? "No word of this title is read." : "This side has no title.");
    const list = make("p", { class: "m2h-title", role: "listbox", "aria-orientation": "horizontal", "aria-label": `words of the ${this.name}'s title; arrow keys move` });
    this.part.words.forEach(([gap, word], place) => list.append(gap, this.target("word", place, make("span", { role: "option", class: "m2h-word", "aria-selected": "false" }, make("bdi", {}, word)))));
    if (this.part.tail) list.append(make("span", { class: "m2h-tail", title: "not read by the model" }, this.part.tail));
    return list;
  }

  draw() {
    const map = chosenMap(this.model, this.name), links = this.active ? linksOf(this.model, this.name, this.active.kind, this.active.place) : null;
    this.root.style.setProperty("--grey", map?.cells || links ? Math.min(1, 2 * this.model.get("opacity")) : 0);
    const lit = { cell: links && this.active.kind === "word" ? links : null, word: links && this.active.kind === "cell" ? links : null };
    for (const [kind, all, strongest] of [["cell", this.cells, this.model.get("opacity")], ["word", this.words, 0.6]]) {
      const own = map ? (kind === "cell" ? map.cells : map.words) : null;
      all.forEach((element, place) => {
        const told = own ? written(own[place], map.signed, map.most) : "no number";
        if (lit[kind]) paint(element, lit[kind].values[place], lit[kind].most, false, kind === "cell" ? Math.max(0.5, strongest) : 0.6);
        else paint(element, own ? own[place] : 0, map ? map.most : 0, map ? map.signed : false, strongest);
        element.title = told;
        element.setAttribute("aria-label", `${this.nameOf(kind, place)}: ${told}`);
        const here = this.is(kind, place);
        element.classList.toggle("m2h-here", here);
        element.classList.toggle("m2h-pinned", here && this.pinned);
        if (kind === "word") element.setAttribute("aria-selected", String(here));
        element.tabIndex = here || (place === 0 && !(this.active && this.active.kind === kind)) ? 0 : -1;
      });
    }
    this.tell(map, links);
    this.scale(map, links);
    this.judge(map);
  }

  tell(map, links) {
    if (!this.active) { this.told.textContent = this.part.links ? "Point at a word or a cell, or move with tab and arrow keys." : "Point at a word or a cell to read its number."; return; }
    const { kind, place } = this.active, own = map ? (kind === "cell" ? map.cells : map.words) : null;
    const value = own ? `${this.nameOf(kind, place)}: ${written(own[place], map.signed, map.most)}.` : `${this.nameOf(kind, place)}.`;
    this.told.textContent = value + this.linkWords(kind, links);
  }

  linkWords(kind, links) {
    if (!links) return this.part.links || !cellsOf(this.part) || !this.part.words.length ? "" : " Links between words and cells were not recorded.";
    const order = range(links.values.length).sort((a, b) => links.values[b] - links.values[a]).slice(0, 2);
    const named = order.map((place) => `${this.nameOf(kind === "word" ? "cell" : "word", place)} (${written(links.values[place], false, links.most)})`).join(" and ");
    return kind === "word" ? ` It attends most to ${named}.` : ` Most attention from ${named}.`;
  }

  scale(map, links) {
    const signed = !links && map && map.signed, most = links ? links.most : map ? map.most : 0;
    const title = links ? `attention ${this.active.kind === "word" ? "from this word to each cell" : "from each word to this cell"}, ${links.where}` : map ? map.title : "";
    this.legend.replaceChildren();
    if (!title) return;
    const ends = signed ? [written(-most, true, most), "0", written(most, true, most)] : ["0 %", written(most, false, most)];
    this.legend.append(make("span", { class: "m2h-what" }, title), make("span", { class: `m2h-ramp ${signed ? "m2h-signed" : ""}`, role: "img", "aria-label": `scale from ${ends[0]} to ${ends[ends.length - 1]}` }),
      make("span", { class: "m2h-ends" }, ...ends.map((end) => make("span", {}, end))));
    if (signed) this.legend.append(make("span", { class: "m2h-ends" }, make("span", {}, "against the match"), make("span", {}, "for the match")));
    if (!links && map && most === 0) this.legend.append(make("b", {}, "Every number of this map is zero."));
    if (!links && map && this.cells.length && !map.cells) this.legend.append(make("span", {}, "This method gives no numbers for cells."));
  }

  judge(map) {
    const lines = [], job = this.model.get("job"), method = this.model.get("method"), offered = this.model.get("offered").includes(method);
    const mine = job.side === this.name && job.method === method;
    const button = (words, measure) => make("button", { type: "button", onclick: () => this.model.send({ do: measure ? "measure" : "compute", method, side: this.name }) }, words);
    if (!map && mine && job.state === "running") lines.push(make("p", {}, "Being computed …"));
    else if (!map && mine && job.state === "failed") lines.push(make("p", { class: "m2h-warning", role: "alert" }, `No map: ${job.message}`), button("Try again"));
    else if (!map) lines.push(make("p", {}, this.model.get("expert") !== null ? "No routing weights were recorded on this side." : mine && job.state === "cancelled" ? "Cancelled: there is no map." : "There is no map of this method for this side."), ...(offered ? [button("Compute")] : []));
    else if (map.single) lines.push(make("p", {}, "Faithfulness is measured for whole maps, not for one layer, head or expert."));
    else if (map.faith) {
      lines.push(make("p", {}, map.faith.line));
      if (map.faith.warning) lines.unshift(make("p", { class: "m2h-warning", role: "note" }, make("b", { "aria-hidden": "true" }, "⚠ "), map.faith.warning));
      if (map.faith.remark) lines.unshift(make("p", { class: "m2h-note", role: "note" }, map.faith.remark));
    } else {
      const failed = mine && job.state === "failed", line = make("p", failed ? { class: "m2h-warning", role: "alert" } : {}, failed ? `Not measured: ${job.message}` : map.tried ? "Faithfulness: it could not be measured." : "Faithfulness: not measured.");
      lines.push(line, ...(offered && !map.tried ? [button("Measure", true)] : []));
    }
    if (map && map.note) lines.push(make("p", { class: "m2h-note" }, map.note));
    if (this.part.unread) lines.push(make("p", { class: "m2h-note" }, `The last ${this.part.unread === 1 ? "word was" : `${this.part.unread} words were`} not read.`));
    const focused = this.trust.contains(this.trust.getRootNode().activeElement);
    this.trust.replaceChildren(...lines);
    if (focused) this.trust.querySelector("button")?.focus();
  }
}

// The controls over both sides.
class Controls {
  constructor(model) {
    this.model = model;
    const payload = model.get("payload"), parts = SIDES.map((side) => payload.sides[side]);
    const blocks = parts.flatMap((part) => [part.pooled, part.links]).filter(Boolean), experts = parts.map((part) => part.experts).filter(Boolean);
    const names = parts.map((part) => part.layer_names).reduce((a, b) => (b.length > a.length ? b : a), []);
    const most = (place) => Math.max(1, ...blocks.map((block) => block.shape[place]));
    this.list = this.select("method", "method", []);
    const moe = Math.max(1, ...experts.map((block) => block.shape[0])), moeNames = parts.map((part) => part.expert_layers).reduce((a, b) => (b.length > a.length ? b : a), []);
    this.rows = [this.list, this.select("show", "side", [["both", "both sides"], ["query", "query"], ["item", "item"]])];
    if (most(0) > 1) this.rows.push(this.slider("layer", "layer", most(0), (place) => names[place] ?? `layer ${place}`, "all layers"));
    if (most(1) > 1) this.rows.push(this.slider("head", "head", most(1), (place) => `head ${place}`, "all heads"));
    if (experts.length) this.rows.push(this.select("expert", "expert", [["", "off"], ...range(experts[0].experts).map((z) => [String(z), `expert ${z}`])], (text) => (text === "" ? null : Number(text))));
    if (experts.length && moe > 1) this.rows.push(this.slider("MoE layer", "moe_layer", moe, (place) => `layer ${moeNames[place] ?? place}`));
    const opacity = make("input", { type: "range", min: 0, max: 1, step: 0.05, oninput: () => this.put("opacity", Number(opacity.value)) });
    this.rows.push(this.labelled("opacity", opacity, make("output"), () => { opacity.value = model.get("opacity"); return `${Math.round(100 * model.get("opacity"))} %`; }));
    this.bar = make("div", { class: "m2h-progress", hidden: true }, make("span"), make("progress", { max: 1, "aria-label": "progress" }), make("button", { type: "button", onclick: () => model.send({ do: "cancel" }) }, "Cancel"));
    this.root = make("div", { class: "m2h-controls", role: "group", "aria-label": "what is shown" }, ...this.rows);
  }

  put(name, value) { this.model.set(name, value); this.model.save_changes(); }

  labelled(words, control, output, refresh) {
    const label = make("label", { "data-control": words }, make("span", {}, words), control, ...(output ? [output] : []));
    label.refresh = () => { const told = refresh(); if (output) { output.textContent = told; control.setAttribute("aria-valuetext", told); } };
    return label;
  }

  select(words, trait, options, read = (text) => text) {
    const control = make("select", { onchange: () => this.put(trait, read(control.value)) });
    const fill = (some) => control.replaceChildren(...some.map(([value, name]) => make("option", { value }, name)));
    fill(options);
    const label = this.labelled(words, control, null, () => { const value = this.model.get(trait); control.value = value === null ? "" : value; });
    label.fill = fill;
    return label;
  }

  slider(words, trait, count, name, all = null) {
    const shift = all === null ? 0 : 1; // the first place is the mean over all
    const control = make("input", { type: "range", min: 0, max: count - 1 + shift, step: 1, oninput: () => this.put(trait, shift && control.value === "0" ? null : Number(control.value) - shift) });
    return this.labelled(words, control, make("output"), () => { const value = this.model.get(trait); control.value = value === null ? 0 : value + shift; return value === null ? all : name(value); });
  }

  draw() {
    const payload = this.model.get("payload"), found = this.model.get("found"), known = new Set(SIDES.flatMap((side) => Object.keys(found[side] ?? {})));
    if (SIDES.some((side) => payload.sides[side].pooled)) known.add("attention");
    const methods = [...new Set([...known, ...this.model.get("offered")])], key = methods.map((method) => method + known.has(method)).join();
    if (this.key !== key) this.list.fill(methods.map((method) => [method, (payload.names[method] ?? method) + (known.has(method) ? "" : " (compute)")]));
    this.key = key;
    for (const row of this.rows) row.refresh();
    const job = this.model.get("job"), [words, progress, cancel] = this.bar.children;
    this.bar.hidden = job.state !== "running";
    words.textContent = job.state === "running" ? `${payload.names[job.method] ?? job.method}, ${job.side}${job.note ? `: ${job.note}` : ""}` : "";
    if (job.share > 0) progress.value = job.share; else progress.removeAttribute("value");
    cancel.disabled = job.state !== "running";
    const off = this.model.get("expert") === null;
    for (const row of this.rows) if (row.dataset.control === "MoE layer") row.querySelector("input").disabled = off;
  }
}

function render({ model, el }) {
  const payload = model.get("payload"), live = make("p", { class: "m2h-unseen", role: "status", "aria-live": "polite" });
  const say = (words) => { live.textContent = words; };
  const controls = new Controls(model), sides = SIDES.map((name) => new Side(model, name, say));
  const heading = make("p", { class: "m2h-score" }, "score ", make("b", {}, payload.score === null ? "unknown" : payload.score.toFixed(3)), ...(payload.model ? [" · ", make("bdi", {}, payload.model)] : []));
  const root = make("div", { class: "m2h", "data-lm-suppress-shortcuts": "true" }, heading, controls.root, controls.bar, make("div", { class: "m2h-sides" }, ...sides.map((side) => side.root)),
    ...payload.remarks.map((words) => make("p", { class: "m2h-note" }, words)), live);
  el.append(root);
  let told = "";
  const draw = () => {
    controls.draw();
    for (const side of sides) { side.root.hidden = ![side.name, "both"].includes(model.get("side")); side.draw(); }
    const job = model.get("job"), state = job.state + (job.message ?? "");
    if (state !== told && job.state !== "idle") say(`${payload.names[job.method] ?? job.method}, ${job.side}: ${job.state === "running" ? "being computed" : job.state}. ${job.message ?? ""}`);
    told = state;
  };
  let asked = 0;
  const soon = () => { cancelAnimationFrame(asked); asked = requestAnimationFrame(draw); };
  for (const name of TRAITS) model.on(`change:${name}`, soon);
  draw();
  return () => {
    cancelAnimationFrame(asked);
    for (const name of TRAITS) model.off(`change:${name}`, soon);
    for (const side of sides) if (side.address) URL.revokeObjectURL(side.address);
  };
}

export default { render };
