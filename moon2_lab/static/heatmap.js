// The pair heatmap. One file for two places: the notebook widget (anywidget calls render) and the self-contained page (a model that lives in the page).
// It draws what it is given and asks nothing of the network. Titles are put in as text, never as HTML.

const SIDES = ["query", "item"];
const TRAITS = ["payload", "data", "found", "offered", "method", "side", "layer", "head", "cross_layer", "expert", "moe_layer", "relative", "cross_relative", "first_apart", "patches", "opacity", "job"];
const CROSS = "cross"; // the method whose numbers stand between the two sides

const largest = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);

// Points are hundredths of the score; as many digits as tell the largest from a tenth of it.
function points(value, most) {
  const digits = most > 0 ? Math.min(6, Math.max(1, 1 - Math.floor(Math.log10(100 * most)))) : 1;
  return (value < 0 ? "−" : "+") + Math.abs(100 * value).toFixed(digits);
}

function written(value, signed, most, unit = "") {
  if (unit === "points") return points(value, most);
  if (unit === "share") return `${value < 0 ? "−" : "+"}${(100 * Math.abs(value)).toFixed(most >= 0.1 ? 1 : 2)} %`;
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

// What is looked at: routing of an expert, the cross map, attention by layer and head, or a map of another method.
function modeOf(model) {
  const payload = model.get("payload"), method = model.get("method");
  if (model.get("expert") !== null) return "expert";
  if (method === CROSS && payload.cross) return "cross";
  return method === "attention" && SIDES.some((side) => payload.sides[side].pooled) ? "attention" : "map";
}

// The number that gets full colour for a patch or a word.
const fullOf = (map, kind) => map.own?.[kind] ?? map.most;

// The largest number that gets full colour: all but the one that stands apart.
const rangeOf = (values, apart) => largest(apart === null ? values : values.filter((_, place) => place !== apart));

// A map from the numbers of all patches and words.
function cut(model, part, values, rest) {
  const patches = cellsOf(part), apart = rest.apart && model.get("first_apart") && values.length > 1 ? part.first ?? null : null;
  const cells = values.slice(0, patches), words = values.slice(patches), map = { cells: patches ? cells : null, words, most: rangeOf(values, apart), signed: false, ...rest, apart };
  if (map.unit === "points" && patches > 1) map.own = { cell: rangeOf(cells, apart), word: rangeOf(words, apart === null ? null : apart - patches) }; // of many patches each gives less than a word
  return map;
}

// Shares of attention, and what they are beyond even looks where that is asked for and known.
function shares(model, part, name, layer, head, start, step, count) {
  const bytes = bytesOf(model.get("data")), block = part[name], even = part.even?.[name];
  const values = numbers(bytes, block, layer, head, start, step, count);
  if (!model.get("relative") || !even) return { values, relative: false };
  const flat = numbers(bytes, even, even.shape[0] === 1 ? null : layer, null, start, step, count);
  return { values: values.map((value, place) => value - flat[place]), relative: true };
}

// One layer of the cross map as { at(side, mine, theirs), margins, total, ... }; it is kept until another is asked for.
const KEPT = new WeakMap();
function crossOf(model) {
  const block = model.get("payload").cross, [layers, rows, columns] = block.shape;
  const layer = model.get("cross_layer") ?? layers - 1, relative = model.get("cross_relative"), key = `${layer} ${relative}`;
  if (KEPT.get(block)?.key === key) return KEPT.get(block);
  const bytes = bytesOf(model.get("data")).slice(block.at + 2 * layer * rows * columns, block.at + 2 * (layer + 1) * rows * columns);
  const values = Float64Array.from(new Int16Array(bytes.buffer), (value) => (value * block.scales[layer]) / 32767);
  const { query, item } = block.weights, total = block.sums[layer];
  if (relative) for (const q of range(rows)) for (const i of range(columns)) values[q * columns + i] -= total * query[q] * item[i];
  const at = (side, mine, other) => (side === "query" ? values[mine * columns + other] : values[other * columns + mine]);
  const margins = { query: range(rows).map((q) => range(columns).reduce((sum, i) => sum + at("query", q, i), 0)), item: range(columns).map((i) => range(rows).reduce((sum, q) => sum + at("query", q, i), 0)) };
  KEPT.set(block, { key, at, margins, total, layer, relative, rows, columns });
  return KEPT.get(block);
}

// The map to be drawn on one side: { cells, words, signed, most, title, faith } or null where there is none.
function chosenMap(model, side) {
  const part = model.get("payload").sides[side], bytes = bytesOf(model.get("data")), count = cellsOf(part) + part.words.length;
  const get = (name) => model.get(name), mode = modeOf(model);
  if (mode === "expert") {
    if (!part.experts) return null;
    const block = part.experts, layer = block.shape[0] === 1 ? 0 : get("moe_layer");
    const where = block.averaged ? "mean over the MoE layers" : `layer ${part.expert_layers[layer] ?? layer}`;
    return cut(model, part, numbers(bytes, block, layer, null, get("expert"), block.experts, count), { title: `routing weight of expert ${get("expert")}, ${where}`, single: true });
  }
  const method = get("method"), whole = get("layer") === null && get("head") === null, map = (get("found")[side] ?? {})[method];
  if (mode === "cross") {
    const cross = crossOf(model), block = get("payload").cross, last = cross.layer === block.shape[0] - 1;
    const title = `points of the score${cross.relative ? ", beyond an even share" : ""}${last ? "" : `, states ${block.layers[cross.layer]}`}`;
    const aside = last ? { faith: map?.faith, tried: map?.tried, note: map?.note, method } : { single: true, note: "What the score would be made of if the model ended at this layer: nothing was trained to be read there." };
    return cut(model, part, cross.margins[side], { title, signed: true, unit: "points", apart: true, ...aside });
  }
  if (mode === "attention" && part.pooled) {
    const { values, relative } = shares(model, part, "pooled", get("layer"), get("head"), 0, 1, count);
    const title = `attention, ${placeWords(part.pooled, part, get("layer"), get("head"))}${relative ? ", beyond even attention" : ""}`;
    const note = outsideWords(part.pooled, get("layer"), get("head")), measured = whole && map ? { faith: map.faith, tried: map.tried, note: [map.note, note].filter(Boolean).join(" "), method } : { single: true, note };
    return cut(model, part, values, { title, signed: relative, unit: relative ? "share" : "", apart: true, ...measured });
  }
  if (!map) return null;
  const all = [...(map.cells ?? []), ...map.words];
  return { cells: map.cells, words: map.words, signed: map.signed, most: largest(all), title: get("payload").names[method] ?? method, note: map.note, faith: map.faith, tried: map.tried, method, apart: null };
}

// Attention between one word and all cells and words, or between one cell and all words: { cells, words, most }.
function linksOf(model, side, kind, place) {
  const part = model.get("payload").sides[side], cells = cellsOf(part), words = part.words.length;
  if (modeOf(model) !== "attention" || !part.pooled || !(part.links || part.word_links)) return null;
  const layer = model.get("layer"), head = model.get("head"), apart = model.get("first_apart") ? part.first ?? null : null;
  const found = { cells: null, words: null, relative: false, apart, where: placeWords(part.links ?? part.word_links, part, layer, head) };
  const take = (name, ...places) => { const { values, relative } = shares(model, part, name, layer, head, ...places); found.relative ||= relative; return values; };
  if (kind === "word" && part.links) found.cells = take("links", place * cells, 1, cells);
  if (kind === "word" && part.word_links) found.words = take("word_links", place * words, 1, words);
  if (kind === "cell" && part.links) found.words = take("links", place, cells, words);
  const offset = (values, from) => (values ?? []).filter((_, at) => apart === null || at + from !== apart);
  found.most = largest([...offset(found.cells, 0), ...offset(found.words, kind === "word" ? cells : -1)]);
  return found;
}

function paint(element, value, most, signed, strongest) {
  const strength = most > 0 ? Math.min(1, Math.abs(value) / most) : 0;
  const colour = signed ? (value > 0 ? "--for" : "--against") : "--share";
  element.style.backgroundColor = strength > 0 ? `rgb(var(${colour}) / ${(strongest * strength).toFixed(3)})` : "";
}

// Heat over a picture: one pixel for each cell, which the browser draws large and smooth.
function drawHeat(canvas, values, map, strongest, root) {
  const context = canvas.getContext("2d"), style = getComputedStyle(root), colour = (name) => style.getPropertyValue(name).trim().split(/\s+/).map(Number);
  const colours = { for: colour("--for"), against: colour("--against"), share: colour("--share") }, image = context.createImageData(canvas.width, canvas.height);
  values.forEach((value, place) => {
    const full = fullOf(map, "cell"), strength = full > 0 && place !== map.apart ? Math.min(1, Math.abs(value) / full) : 0;
    image.data.set([...colours[map.signed ? (value > 0 ? "for" : "against") : "share"], 255 * strongest * strength], 4 * place);
  });
  context.putImageData(image, 0, 0);
}

// One side: its picture with cells, its title as words, a legend, a line of numbers and the line about faithfulness.
class Side extends Pointing {
  constructor(model, name, say) {
    super({ model, name, say });
    this.all = [this];
    this.part = model.get("payload").sides[name];
    this.told = make("p", { class: "m2h-told" });
    this.legend = make("div", { class: "m2h-legend" });
    this.trust = make("div", { class: "m2h-trust" });
    this.arcs = draw("svg", { class: "m2h-arcs", "aria-hidden": "true" });
    this.root = this.hear(make("section", { class: "m2h-side", "data-side": name, "aria-label": `${name} of the pair` },
      make("h3", {}, make("span", {}, name), make("bdi", { class: "m2h-id" }, this.part.id)), this.picture(), this.title(), this.legend, this.told, this.trust));
  }

  get other() { return this.all.find((side) => side !== this); }

  // The side whose part is followed across the pair: what is pinned before what is pointed at.
  get lead() { return this.all.find((side) => side.active && side.pinned) ?? this.all.find((side) => side.active && side.latest) ?? this.all.find((side) => side.active); }

  announce() { for (const side of this.all) side.latest = side === this; this.say(`${this.name}: ${this.told.textContent}`); }

  picture() {
    if (!cellsOf(this.part)) return make("p", { class: "m2h-none" }, "This side has no picture.");
    const [rows, columns] = gridOf(this.part), frame = make("div", { class: "m2h-picture" });
    if (this.part.image) {
      const bytes = bytesOf(this.model.get("data")).slice(this.part.image.at, this.part.image.at + this.part.image.size);
      this.address = URL.createObjectURL(new Blob([bytes], { type: "image/jpeg" }));
      takeAspect(frame, this.part.image.aspect);
      frame.append(make("img", { src: this.address, alt: "", draggable: "false" }));
    }
    this.heat = make("canvas", { class: "m2h-heat", width: columns, height: rows, "aria-hidden": "true" });
    const table = make("div", { class: "m2h-cells", role: "grid", "aria-label": `cells of the ${this.name}'s picture, ${rows} by ${columns}; arrow keys move` });
    table.style.setProperty("--rows", rows);
    table.style.setProperty("--columns", columns);
    for (const row of range(rows)) {
      const line = make("div", { role: "row" });
      for (const column of range(columns)) line.append(this.target("cell", row * columns + column, make("div", { role: "gridcell", class: "m2h-cell" })));
      table.append(line);
    }
    frame.append(this.heat, table);
    return frame;
  }

  title() {
    if (!this.part.words.length) return make("p", { class: "m2h-none" }, this.part.text ? "No word of this title is read." : "This side has no title.");
    const list = make("p", { class: "m2h-title", role: "listbox", "aria-orientation": "horizontal", "aria-label": `words of the ${this.name}'s title; arrow keys move` });
    this.part.words.forEach(([gap, word], place) => list.append(gap, this.target("word", place, make("span", { role: "option", class: "m2h-word", "aria-selected": "false" }, make("bdi", {}, word)))));
    if (this.part.tail) list.append(make("span", { class: "m2h-tail", title: "not read by the model" }, this.part.tail));
    list.append(this.arcs);
    return list;
  }

  // Place of a patch or word among all of them.
  place(kind, place) { return kind === "cell" ? place : cellsOf(this.part) + place; }

  // What the part of the other side that is followed met on this one.
  met() {
    const lead = this.lead;
    if (modeOf(this.model) !== "cross" || !lead || lead === this) return null;
    const cross = crossOf(this.model), followed = lead.place(lead.active.kind, lead.active.place), count = cellsOf(this.part) + this.part.words.length;
    const name = lead.nameOf(lead.active.kind, lead.active.place);
    return cut(this.model, this.part, range(count).map((place) => cross.at(this.name, place, followed)), { title: `points with ${name} of the ${lead.name}`, signed: true, unit: "points", apart: true, met: name });
  }

  draw() { for (const side of modeOf(this.model) === "cross" ? this.all : [this]) side.paint(); }

  paint() {
    const own = chosenMap(this.model, this.name), map = this.met() ?? own, links = this.active ? linksOf(this.model, this.name, this.active.kind, this.active.place) : null;
    const opacity = this.model.get("opacity"), square = this.model.get("patches");
    const lit = { cell: links?.cells ?? null, word: links?.words ?? null }, linked = links && { ...links, signed: links.relative };
    const shown = { cell: lit.cell ?? map?.cells ?? null, word: lit.word ?? map?.words ?? null };
    this.root.style.setProperty("--grey", shown.cell ? Math.min(1, 2 * opacity) : 0);
    for (const [kind, all, strongest] of [["cell", this.cells, opacity], ["word", this.words, 0.6]]) {
      const values = shown[kind], scale = lit[kind] ? linked : map;
      all.forEach((element, place) => {
        const apart = scale && scale.apart !== null && this.place(kind, place) === scale.apart;
        const told = values ? written(values[place], scale.signed, scale.most, lit[kind] ? (links.relative ? "share" : "") : map.unit) : "no number";
        const drawn = kind === "word" || square || all.length === 1;
        if ((apart && kind === "cell") || !values || !drawn) paint(element, 0, 0, false, 0); else paint(element, values[place], fullOf(scale, kind), scale.signed, lit[kind] && kind === "cell" ? Math.max(0.5, strongest) : strongest);
        element.classList.toggle("m2h-apart", Boolean(apart && values));
        element.title = apart && values ? `${told}, first position, apart` : told;
        element.setAttribute("aria-label", `${this.nameOf(kind, place)}: ${element.title}`);
        const here = this.is(kind, place);
        element.classList.toggle("m2h-here", here);
        element.classList.toggle("m2h-pinned", here && this.pinned);
        if (kind === "word") element.setAttribute("aria-selected", String(here));
        element.tabIndex = here || (place === 0 && !(this.active && this.active.kind === kind)) ? 0 : -1;
      });
    }
    if (this.heat) {
      this.heat.hidden = square || this.cells.length === 1 || !shown.cell;
      if (!this.heat.hidden) drawHeat(this.heat, shown.cell, lit.cell ? linked : map, lit.cell ? Math.max(0.5, opacity) : opacity, this.root);
    }
    this.tell(own, map, links);
    this.scale(map, links);
    this.judge(own);
    this.drawArcs(links);
  }

  // Lines from the word that is pointed at to the words it attends to most.
  drawArcs(links) {
    this.arcs.replaceChildren();
    if (!links?.words || this.active.kind !== "word" || this.model.get("side") === "none") return;
    const from = this.active.place, cells = cellsOf(this.part), frame = this.arcs.parentNode.getBoundingClientRect();
    const worth = (place) => links.words[place] > 0 && place !== from && cells + place !== links.apart;
    const strongest = range(links.words.length).filter(worth).sort((a, b) => links.words[b] - links.words[a]).slice(0, 3);
    const middle = (place) => { const box = this.words[place].getBoundingClientRect(); return [box.left + box.width / 2 - frame.left, box.top - frame.top + 3]; };
    for (const place of strongest) {
      const [x, y] = middle(from), [u, v] = middle(place), height = Math.min(y, v) - Math.min(22, 6 + Math.abs(x - u) / 8);
      this.arcs.append(draw("path", { d: `M ${x} ${y} Q ${(x + u) / 2} ${height} ${u} ${v}`, "stroke-width": (1 + 3 * (links.words[place] / (links.most || 1))).toFixed(2) }));
    }
  }

  tell(own, map, links) {
    const mode = modeOf(this.model), lead = this.lead;
    if (!this.active) {
      const hint = { cross: "Point at a word or a cell: what it met lights up on the other side.", attention: "Point at a word or a cell, or move with tab and arrow keys." }[mode] ?? "Point at a word or a cell to read its number.";
      this.told.textContent = map?.met ? `What ${map.met} of the ${lead.name} met here: ${this.strongest(map, 3)}.` : hint;
      return;
    }
    const { kind, place } = this.active, values = own ? (kind === "cell" ? own.cells : own.words) : null, name = this.nameOf(kind, place);
    if (mode === "cross") { this.told.textContent = this.crossWords(name, own, values[place], lead); return; }
    const value = values ? `${name}: ${written(values[place], own.signed, own.most, own.unit)}.` : `${name}.`;
    this.told.textContent = value + (mode === "attention" ? this.linkWords(kind, links) : "");
  }

  crossWords(name, own, value, lead) {
    const cross = crossOf(this.model), mine = this.place(this.active.kind, this.active.place), sum = `${points(value, own.most)} points${cross.relative ? " beyond its even share" : ` of ${(100 * cross.total).toFixed(1)}`}`;
    if (lead !== this && lead) {
      const theirs = lead.place(lead.active.kind, lead.active.place), both = cross.at(this.name, mine, theirs);
      return `${name} with ${lead.nameOf(lead.active.kind, lead.active.place)}: ${points(both, Math.abs(both))} points; with all of the ${lead.name} ${sum}.`;
    }
    const other = this.other, count = cellsOf(other.part) + other.part.words.length, met = cut(this.model, other.part, range(count).map((place) => cross.at(this.name, mine, place)), { apart: true });
    return `${name}: ${sum}. It met most ${other.strongest({ ...met, unit: "points", signed: true }, 3)}.`;
  }

  // The parts of a map with the largest numbers, in words; a picture first as a whole.
  strongest(map, most) {
    const cells = cellsOf(this.part), all = [];
    if (map.cells && cells > 1) all.push(["the picture", map.cells.reduce((sum, value) => sum + value, 0)]);
    else if (map.cells) all.push([this.nameOf("cell", 0), map.cells[0]]);
    map.words.forEach((value, place) => cells + place !== map.apart && all.push([this.nameOf("word", place), value]));
    const order = all.sort((a, b) => b[1] - a[1]).slice(0, most), top = largest(order.map(([, value]) => value));
    return order.map(([name, value]) => `${name} (${points(value, top)})`).join(", ");
  }

  linkWords(kind, links) {
    if (!links) return !cellsOf(this.part) || !this.part.words.length ? "" : " Links between words and cells were not recorded.";
    const all = [];
    for (const [other, values] of [["cell", links.cells], ["word", links.words]])
      (values ?? []).forEach((value, place) => { if (!(kind === "word" && this.place(other, place) === links.apart)) all.push([this.nameOf(other, place), value]); });
    const named = all.sort((a, b) => b[1] - a[1]).slice(0, 2).map(([name, value]) => `${name} (${written(value, links.relative, links.most, links.relative ? "share" : "")})`).join(" and ");
    const beyond = links.relative ? ", beyond even attention" : "";
    return kind === "word" ? ` It attends most to ${named}${beyond}.` : ` Most attention from ${named}${beyond}.`;
  }

  scale(map, links) {
    const signed = links ? links.relative : map && map.signed, most = links ? links.most : map ? map.most : 0, unit = links ? (links.relative ? "share" : "") : map?.unit;
    const title = links ? `attention ${this.active.kind === "word" ? "from this word" : "from each word to this cell"}, ${links.where}${links.relative ? ", beyond even attention" : ""}` : map ? map.title : "";
    this.legend.replaceChildren();
    if (!title) return;
    const own = links ? null : map?.own, full = own ? own.word || own.cell : most;
    const ends = signed ? [written(-full, true, full, unit), "0", written(full, true, full, unit)] : ["0 %", written(most, false, most)];
    this.legend.append(make("span", { class: "m2h-what" }, title), make("span", { class: `m2h-ramp ${signed ? "m2h-signed" : ""}`, role: "img", "aria-label": `scale from ${ends[0]} to ${ends[ends.length - 1]}` }),
      make("span", { class: "m2h-ends" }, ...ends.map((end) => make("span", {}, end))));
    const poles = unit === "share" ? ["less than even", "more than even"] : ["against the match", "for the match"];
    if (signed) this.legend.append(make("span", { class: "m2h-ends" }, ...poles.map((words) => make("span", {}, words))));
    if (own?.word) this.legend.append(make("span", {}, `Full colour is ${points(own.word, own.word)} for a word, ${points(own.cell, own.cell)} for a patch.`));
    const apart = links ? null : map?.apart ?? null;
    if (apart !== null) {
      const cell = apart < cellsOf(this.part), value = cell ? map.cells[apart] : map.words[apart - cellsOf(this.part)];
      this.legend.append(make("span", { class: "m2h-first" }, `First position, apart: ${written(value, map.signed, Math.max(map.most, Math.abs(value)), map.unit)} at ${this.nameOf(cell ? "cell" : "word", cell ? apart : apart - cellsOf(this.part))}.`));
    }
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
      const failed = mine && job.state === "failed", line = make("p", failed ? { class: "m2h-warning", role: "alert" } : {}, failed ? `Not measured: ${job.message}` : map.tried ? "Faithfulness: it could not be measured." : `Faithfulness: ${this.model.get("later") || "not measured."}`);
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
    if (most(0) > 1) this.rows.push(this.needs("attention", this.slider("layer", "layer", most(0), (place) => names[place] ?? `layer ${place}`, "all layers")));
    if (most(1) > 1) this.rows.push(this.needs("attention", this.slider("head", "head", most(1), (place) => `head ${place}`, "all heads")));
    if (payload.cross?.shape[0] > 1) this.rows.push(this.needs("cross", this.slider("states", "cross_layer", payload.cross.shape[0], (place) => payload.cross.layers[place], null, payload.cross.shape[0] - 1)));
    if (experts.length) this.rows.push(this.select("expert", "expert", [["", "off"], ...range(experts[0].experts).map((z) => [String(z), `expert ${z}`])], (text) => (text === "" ? null : Number(text))));
    if (experts.length && moe > 1) this.rows.push(this.needs("expert", this.slider("MoE layer", "moe_layer", moe, (place) => `layer ${moeNames[place] ?? place}`)));
    const opacity = make("input", { type: "range", min: 0, max: 1, step: 0.05, oninput: () => this.put("opacity", Number(opacity.value)) });
    this.rows.push(this.labelled("opacity", opacity, make("output"), () => { opacity.value = model.get("opacity"); return `${Math.round(100 * model.get("opacity"))} %`; }));
    const checks = [this.check("patches", "patches", null)];
    if (payload.cross || blocks.length) checks.push(this.check("relative to even", { attention: "relative", cross: "cross_relative" }), this.check("first position apart", { attention: "first_apart", cross: "first_apart" }));
    if (!parts.some((part) => cellsOf(part) > 1)) checks.shift();
    this.rows.push(...checks);
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

  // A control that does something in one mode only: elsewhere it is off.
  needs(mode, label) { label.mode = mode; return label; }

  // A box for a trait, or for the trait that belongs to the mode.
  check(words, traits) {
    const trait = () => (typeof traits === "string" ? traits : traits[modeOf(this.model)]);
    const control = make("input", { type: "checkbox", onchange: () => this.put(trait(), control.checked) }), label = make("label", { class: "m2h-check", "data-control": words }, control, make("span", {}, words));
    label.refresh = () => { control.disabled = !trait(); control.checked = trait() ? this.model.get(trait()) : false; };
    return label;
  }

  slider(words, trait, count, name, all = null, unset = 0) {
    const shift = all === null ? 0 : 1; // the first place is the mean over all
    const control = make("input", { type: "range", min: 0, max: count - 1 + shift, step: 1, oninput: () => this.put(trait, shift && control.value === "0" ? null : Number(control.value) - shift) });
    return this.labelled(words, control, make("output"), () => { const value = this.model.get(trait); control.value = value === null ? unset : value + shift; return value === null ? all ?? name(unset) : name(value); });
  }

  draw() {
    const payload = this.model.get("payload"), found = this.model.get("found"), known = new Set(SIDES.flatMap((side) => Object.keys(found[side] ?? {})));
    if (SIDES.some((side) => payload.sides[side].pooled)) known.add("attention");
    if (payload.cross) known.add(CROSS);
    const methods = [...new Set([...(payload.cross ? [CROSS] : []), ...known, ...this.model.get("offered")])], key = methods.map((method) => method + known.has(method)).join();
    if (this.key !== key) this.list.fill(methods.map((method) => [method, (payload.names[method] ?? (method === CROSS ? "cross map" : method)) + (known.has(method) ? "" : " (compute)")]));
    this.key = key;
    for (const row of this.rows) row.refresh();
    const job = this.model.get("job"), [words, progress, cancel] = this.bar.children;
    this.bar.hidden = job.state !== "running";
    words.textContent = job.state === "running" ? `${payload.names[job.method] ?? job.method}, ${job.side}${job.note ? `: ${job.note}` : ""}` : "";
    if (job.share > 0) progress.value = job.share; else progress.removeAttribute("value");
    cancel.disabled = job.state !== "running";
    const mode = modeOf(this.model);
    for (const row of this.rows) if (row.mode) row.querySelector("input").disabled = row.mode !== mode;
  }
}

// The cross map as a table: words of the query against words of the item, a picture as a whole, in points.
class Matrix {
  constructor(model, sides) {
    Object.assign(this, { model, sides, body: make("div", { class: "m2h-scroll", tabindex: "0", role: "region", "aria-label": "cross map, word by word" }) });
    this.root = make("details", { class: "m2h-matrix", open: true, ontoggle: () => this.draw() }, make("summary", {}, "Word by word"), this.body);
  }

  // Rows or columns: [{ name, word }, places among the parts of that side, kind and place to follow].
  heads(side) {
    const { part } = side, cells = cellsOf(part);
    return [...(cells ? [[{ name: "picture" }, range(cells), cells === 1 ? ["cell", 0] : null]] : []), ...part.words.map(([, word], place) => [{ name: word, word: true }, [cells + place], ["word", place]])];
  }

  draw() {
    this.root.hidden = modeOf(this.model) !== "cross";
    if (this.root.hidden || !this.root.open) return;
    const cross = crossOf(this.model), [query, item] = this.sides, rows = this.heads(query), columns = this.heads(item), key = cross.key + rows.length;
    if (this.key === key) return;
    this.key = key;
    const sums = rows.map(([, mine]) => columns.map(([, theirs]) => mine.reduce((sum, q) => sum + theirs.reduce((part, i) => part + cross.at("query", q, i), 0), 0)));
    const between = (row, column) => rows[row][0].word && columns[column][0].word; // a picture is more than any word: words have a scale of their own
    const most = largest(sums.flat()), wordMost = largest(sums.flatMap((row, r) => row.filter((_, c) => between(r, c)))), total = (values) => values.reduce((sum, value) => sum + value, 0), down = columns.map((_, c) => total(sums.map((row) => row[c])));
    const follow = (side, target, element) => { if (target) element.addEventListener("pointerenter", () => side.pinned || side.activate(...target)); return element; };
    const cell = (value, r, c) => { const td = make("td", {}, points(value, most)); paint(td, value, between(r, c) ? wordMost : most, true, 0.6); follow(query, rows[r][2], td); return td; };
    const table = make("table", {}, make("caption", {}, `Points of the score${cross.relative ? " beyond an even share" : ""}: rows are the query, columns the item.`),
      make("thead", {}, make("tr", {}, make("td", {}), ...columns.map(([{ name }, , target]) => follow(item, target, make("th", { scope: "col", title: name }, make("bdi", {}, name)))), make("th", { scope: "col", class: "m2h-sum" }, "sum"))),
      make("tbody", {}, ...rows.map(([{ name }, , target], r) => make("tr", {}, follow(query, target, make("th", { scope: "row" }, make("bdi", {}, name))), ...columns.map((_, c) => cell(sums[r][c], r, c)), make("td", { class: "m2h-sum" }, points(total(sums[r]), most)))),
        make("tr", { class: "m2h-sum" }, make("th", { scope: "row" }, "sum"), ...down.map((value) => make("td", {}, points(value, most))), make("td", {}, points(total(down), most)))));
    table.addEventListener("pointerleave", () => { for (const side of this.sides) side.leave(); });
    this.body.replaceChildren(table);
  }
}

// All layers and heads at a glance: a small picture of the attention of each; a click chooses it.
class Overview {
  constructor(model, sides) {
    Object.assign(this, { model, sides: sides.filter((side) => side.part.pooled), body: make("div", { class: "m2h-overviews" }) });
    this.root = make("details", { class: "m2h-overview", ontoggle: () => this.draw() }, make("summary", {}, "All layers and heads"), this.body);
    this.of = ({ part }) => part.pooled.shape[0] * part.pooled.shape[1];
  }

  draw() {
    this.root.hidden = modeOf(this.model) !== "attention" || !this.sides.some((side) => this.of(side) > 1);
    if (this.root.hidden || !this.root.open) return;
    const key = `${this.model.get("relative")} ${this.model.get("first_apart")}`;
    if (this.key !== key) this.body.replaceChildren(...this.sides.filter((side) => this.of(side) > 1).map((side) => this.grid(side)));
    this.key = key;
    for (const button of this.body.querySelectorAll("button")) button.setAttribute("aria-pressed", String(Number(button.dataset.layer) === this.model.get("layer") && Number(button.dataset.head) === this.model.get("head")));
  }

  grid(side) {
    const [layers, heads] = side.part.pooled.shape, box = make("div", { class: "m2h-thumbs", role: "group", "aria-label": `attention of the ${side.name}, layers by heads` });
    box.style.setProperty("--heads", heads);
    for (const layer of range(layers)) for (const head of range(heads)) box.append(this.thumb(side, layers > 1 ? layer : null, heads > 1 ? head : null));
    return make("section", {}, make("h4", {}, side.name), box);
  }

  thumb(side, layer, head) {
    const { part } = side, cells = cellsOf(part), count = cells + part.words.length;
    const { values, relative } = shares(this.model, part, "pooled", layer, head, 0, 1, count), map = cut(this.model, part, values, { signed: relative, apart: true });
    const name = [layer === null ? "" : part.layer_names[layer] ?? `layer ${layer}`, head === null ? "" : `head ${head}`].filter(Boolean).join(", ");
    const button = make("button", { type: "button", class: "m2h-thumb", title: name, "aria-label": name, "data-layer": layer, "data-head": head, onclick: () => { this.model.set("layer", layer); this.model.set("head", head); this.model.save_changes(); } });
    if (cells) { const [rows, columns] = gridOf(part), canvas = make("canvas", { width: columns, height: rows }); drawHeat(canvas, map.cells, map, 0.9, side.root); button.append(canvas); }
    if (part.words.length) { const canvas = make("canvas", { width: part.words.length, height: 1, class: "m2h-strip" }); drawHeat(canvas, map.words, { ...map, apart: map.apart === null ? null : map.apart - cells }, 0.9, side.root); button.append(canvas); }
    return button;
  }
}

// What the parts of the cross map add up to, beside the score.
function totalWords(block, cross) {
  const parts = `${cross.rows} × ${cross.columns} pairs of parts`;
  if (cross.layer < block.shape[0] - 1) return `; ${block.layers[cross.layer]} the ${parts} add up to ${cross.total.toFixed(3)}`;
  return `: ${parts} add up to ${cross.total.toFixed(7)}, the score is ${block.score.toFixed(7)}`;
}

function render({ model, el }) {
  const payload = model.get("payload"), live = make("p", { class: "m2h-unseen", role: "status", "aria-live": "polite" });
  const say = (words) => { live.textContent = words; };
  const controls = new Controls(model), sides = SIDES.map((name) => new Side(model, name, say));
  for (const side of sides) side.all = sides;
  const matrix = payload.cross ? new Matrix(model, sides) : null, overview = new Overview(model, sides), sum = make("span", { class: "m2h-total" });
  const heading = make("p", { class: "m2h-score" }, "score ", make("b", {}, payload.score === null ? "unknown" : payload.score.toFixed(3)), sum, ...(payload.model ? [" · ", make("bdi", {}, payload.model)] : []));
  const root = make("div", { class: "m2h", "data-lm-suppress-shortcuts": "true" }, heading, controls.root, controls.bar, overview.root, make("div", { class: "m2h-sides" }, ...sides.map((side) => side.root)), ...(matrix ? [matrix.root] : []),
    ...payload.remarks.map((words) => make("p", { class: "m2h-note" }, words)), live);
  el.append(root);
  let told = "";
  const draw = () => {
    controls.draw();
    for (const side of sides) { side.root.hidden = ![side.name, "both"].includes(model.get("side")); side.paint(); }
    matrix?.draw();
    overview.draw();
    sum.textContent = modeOf(model) === "cross" ? totalWords(payload.cross, crossOf(model)) : "";
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
