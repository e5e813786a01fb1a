// The embedding map: products as points of a plane. One file for a notebook (anywidget calls render), for pages and for the demo.
// It draws what it is given and asks nothing of the network. Titles are put in as text, never as HTML.

const TRAITS = ["projection", "frame", "colour", "hidden", "lines", "asking", "active", "selected"];
const MISSING = 65535, MARGIN = 22, NEAR = 14, COLOURS = 8, STEPS = 9, UNKNOWN = COLOURS, MOVING_LINES = 2000, LISTED = 100, FRAME = 700, FAINT = 36, STRONG = 220; // FRAME: milliseconds from one frame to the next
const SIGNS = { t: "■", i: "▲", mm: "●" }, INDEX = { t: 0, i: 1, mm: 2 };
const many = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
const short = (value) => (Math.abs(value) >= 100 || Number.isInteger(value) ? value.toLocaleString("en", { maximumFractionDigits: 0 }) : value.toPrecision(3));

// The numbers of the payload, by what they are.
class Numbers {
  constructor(payload, bytes) {
    const buffer = bytesOf(bytes).slice().buffer;
    this.payload = payload;
    this.bytes = new Uint8Array(buffer);
    this.count = payload.ids.length;
    this.views = Object.keys(payload.views);
    this.points = payload.projections.map((one) => new Uint16Array(buffer, one.at, one.labels.length * this.views.length * this.count * 2));
    this.columns = payload.columns.map((one) => (one.names ? new Uint8Array(buffer, one.at, this.count) : new Float32Array(buffer, one.at, this.count)));
    this.hits = Object.fromEntries(Object.entries(payload.hits).map(([view, { k, at, scores }]) => [view, { k, places: new Int32Array(buffer, at, this.count * k), scores: new Float32Array(buffer, scores, this.count * k) }]));
    this.place = new Map(payload.ids.map((id, place) => [id, place]));
    this.text = payload.ids.map((id, place) => `${id} ${payload.titles[place] ?? ""}`.toLowerCase());
    this.addresses = new Map();
  }

  title(place) { return this.payload.titles[place] || this.payload.ids[place]; }

  // The address of a product's picture; null where the map holds none.
  picture(place) {
    const part = this.payload.pictures[place];
    if (part && !this.addresses.has(place)) this.addresses.set(place, URL.createObjectURL(new Blob([this.bytes.subarray(...part)], { type: "image/jpeg" })));
    return this.addresses.get(place) ?? null;
  }

  // [title, value] of what is known of a product.
  facts(place) {
    return this.payload.columns.flatMap((column, number) => {
      const value = this.columns[number][place];
      const words = column.names ? column.names[value] : Number.isNaN(value) ? undefined : short(value);
      return words === undefined ? [] : [[column.title, words]];
    });
  }

  close() { for (const address of this.addresses.values()) URL.revokeObjectURL(address); }
}

// Colours of the stylesheet as text, and as one number each for the raster: of the names, of a product without one, then steps from low to high.
function coloursOf(root) {
  const probe = make("span"), dot = make("canvas", { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
  const read = (colour) => { probe.style.color = colour; return getComputedStyle(probe).color; };
  const number = (colour) => { dot.fillStyle = read(colour); dot.fillRect(0, 0, 1, 1); const [r, g, b] = dot.getImageData(0, 0, 1, 1).data; return (b << 16) | (g << 8) | r; };
  root.append(probe);
  const names = [...range(COLOURS).map((place) => `var(--s${place})`), "var(--unknown)"], steps = range(STEPS).map((step) => `color-mix(in oklab, var(--low), var(--high) ${(100 * step) / (STEPS - 1)}%)`);
  const found = { points: [...names, ...steps].map(number), soft: number("var(--soft)"), paper: number("var(--paper)"), ink: read("var(--ink)"), accent: read("var(--accent)") };
  probe.remove();
  return found;
}

// A square, a triangle or a disc: the view can be told without its colour.
function trace(pen, view, x, y, size) {
  pen.beginPath();
  if (view === "t") pen.rect(x - size, y - size, 2 * size, 2 * size);
  else if (view === "i") { pen.moveTo(x, y - 1.3 * size); pen.lineTo(x + 1.2 * size, y + size); pen.lineTo(x - 1.2 * size, y + size); pen.closePath(); }
  else pen.arc(x, y, 1.1 * size, 0, 2 * Math.PI);
}

// What a mark covers of the pixels around its middle: [dx, dy, coverage of 256] behind each other, from sixteen samples a pixel.
function coverOf(view, size) {
  const reach = Math.ceil(1.4 * size + 1), found = [], steps = [0.125, 0.375, 0.625, 0.875];
  const within = { t: (x, y) => Math.max(Math.abs(x), Math.abs(y)) <= size, i: (x, y) => y <= size && y >= -1.3 * size && Math.abs(x) <= (1.2 * (y + 1.3 * size)) / 2.3, mm: (x, y) => x * x + y * y <= (1.1 * size) ** 2 }[view] ?? ((x, y) => x * x + y * y <= size * size);
  for (let y = -reach; y <= reach; y += 1) for (let x = -reach; x <= reach; x += 1) {
    let hits = 0;
    for (const a of steps) for (const b of steps) hits += within(x + a - 0.5, y + b - 0.5);
    if (hits) found.push(x, y, 16 * hits);
  }
  return Int32Array.from(found);
}

// Pixels that are written one by one: tens of thousands of points and lines a frame, with and without a graphics card.
class Raster {
  constructor(width, height) {
    Object.assign(this, { width, height, image: new ImageData(width, height) });
    this.pixels = new Uint32Array(this.image.data.buffer);
  }

  fill(colour) { this.pixels.fill(0xff000000 | colour); }

  blend(at, colour, part) { // part: of 256
    const old = this.pixels[at], rest = 256 - part;
    this.pixels[at] = 0xff000000 | (((Math.imul(old & 0xff00ff, rest) + Math.imul(colour & 0xff00ff, part)) >>> 8) & 0xff00ff) | (((Math.imul(old & 0xff00, rest) + Math.imul(colour & 0xff00, part)) >>> 8) & 0xff00);
  }

  dot(x, y, cover, colour, part) {
    const { width, height } = this, cx = Math.round(x), cy = Math.round(y);
    for (let k = 0; k < cover.length; k += 3) {
      const px = cx + cover[k], py = cy + cover[k + 1];
      if (px >= 0 && py >= 0 && px < width && py < height) this.blend(py * width + px, colour, (cover[k + 2] * part) >> 8);
    }
  }

  line(x0, y0, x1, y1, colour, part) {
    const { width, height } = this;
    if ((x0 < 0 && x1 < 0) || (y0 < 0 && y1 < 0) || (x0 > width && x1 > width) || (y0 > height && y1 > height)) return;
    const steps = Math.max(1, Math.round(Math.max(Math.abs(x1 - x0), Math.abs(y1 - y0)))), dx = (x1 - x0) / steps, dy = (y1 - y0) / steps;
    for (let k = 0, x = x0, y = y0; k < steps; k += 1, x += dx, y += dy) if (x >= 0 && y >= 0 && x < width && y < height) this.blend((y | 0) * width + (x | 0), colour, part);
  }
}

function inside(polygon, x, y) {
  let within = false;
  for (let a = 0, b = polygon.length - 1; a < polygon.length; b = a, a += 1) {
    const [ax, ay] = polygon[a], [bx, by] = polygon[b];
    if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) within = !within;
  }
  return within;
}

// The canvas: where the points are, what they look like, which of them is meant.
class Plane {
  constructor(numbers, model) {
    Object.assign(this, { numbers, model, zoom: 1, centre: null, hover: -1, hoverView: "", lasso: null, moving: false, at: model.get("frame"), text: "", off: new Set() });
    this.canvas = make("canvas", { tabindex: "0", role: "img", "data-lm-suppress-shortcuts": "true" });
    this.xs = new Float32Array(numbers.views.length * numbers.count);
    this.ys = new Float32Array(numbers.views.length * numbers.count);
    this.extents = numbers.points.map((points) => {
      const most = [1, 1];
      for (let k = 0; k < points.length; k += 1) if (points[k] !== MISSING && points[k] > most[k % 2]) most[k % 2] = points[k];
      return most;
    });
  }

  refresh(root) { this.colours = coloursOf(root); }

  shown(view) { return !this.model.get("hidden").includes(view); }

  // Whether a product has been filtered out by the search box or the key.
  faded(place) {
    if (this.text && !this.numbers.text[place].includes(this.text)) return true;
    const colour = this.model.get("colour");
    return this.off.size > 0 && colour >= 0 && this.numbers.payload.columns[colour].names && this.off.has(this.numbers.columns[colour][place]);
  }

  // Which of the colours.
  shade(view, place) {
    const colour = this.model.get("colour");
    if (colour < 0) return view % COLOURS;
    const column = this.numbers.payload.columns[colour], value = this.numbers.columns[colour][place];
    if (column.names) return value === 255 ? UNKNOWN : value % COLOURS;
    const [low, high] = column.limits;
    return Number.isNaN(value) ? UNKNOWN : COLOURS + 1 + Math.round(((STEPS - 1) * (value - low)) / (high - low || 1));
  }

  // Places of all points on the canvas, between two frames while the course is played.
  arrange() {
    const { numbers, canvas } = this, number = this.model.get("projection"), points = numbers.points[number], [wide, high] = this.extents[number];
    const width = canvas.clientWidth, height = canvas.clientHeight, scale = this.zoom * Math.min((width - 2 * MARGIN) / wide, (height - 2 * MARGIN) / high);
    const [cx, cy] = this.centre ?? [wide / 2, high / 2], stride = numbers.views.length * numbers.count;
    const last = numbers.payload.projections[number].labels.length - 1, from = Math.min(Math.floor(this.at), last), to = Math.min(from + 1, last), part = Math.min(this.at, last) - from;
    Object.assign(this, { scale, middle: [cx, cy] });
    for (let k = 0; k < stride; k += 1) {
      const a = 2 * (from * stride + k), b = 2 * (to * stride + k);
      if (points[a] === MISSING) { this.xs[k] = NaN; continue; }
      this.xs[k] = width / 2 + (points[a] + part * (points[b] - points[a]) - cx) * scale;
      this.ys[k] = height / 2 - (points[a + 1] + part * (points[b + 1] - points[a + 1]) - cy) * scale;
    }
  }

  // Colour of every point (K,), and strength of every product (N,), of 256: what stays the same while the map moves.
  look() {
    const { numbers } = this, selected = new Set(this.model.get("selected").map((id) => numbers.place.get(id)));
    this.strength = Uint8Array.from(range(numbers.count), (place) => (this.faded(place) || (selected.size > 0 && !selected.has(place)) ? FAINT : STRONG));
    this.shades = Int32Array.from(range(numbers.views.length * numbers.count), (k) => this.colours.points[this.shade(Math.floor(k / numbers.count), k % numbers.count)]);
  }

  draw() {
    const { canvas, numbers } = this, ratio = Math.min(2, devicePixelRatio || 1), width = canvas.clientWidth, height = canvas.clientHeight, pen = canvas.getContext("2d");
    if (!width) return;
    const began = performance.now();
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (this.raster?.width !== canvas.width || this.raster.height !== canvas.height) this.raster = new Raster(canvas.width, canvas.height);
    this.arrange();
    if (!this.moving || !this.shades) this.look();
    const size = numbers.count > 2500 ? 2.2 : numbers.count > 600 ? 3 : 4;
    this.raster.fill(this.colours.paper);
    if (this.model.get("lines")) this.drawLines(ratio);
    this.drawPoints(ratio, size);
    pen.putImageData(this.raster.image, 0, 0);
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.drawHits(pen, size);
    if (this.lasso?.length > 1) {
      pen.beginPath();
      this.lasso.forEach(([x, y]) => pen.lineTo(x, y));
      pen.closePath();
      Object.assign(pen, { fillStyle: this.colours.accent, strokeStyle: this.colours.accent, lineWidth: 1.5, globalAlpha: 0.15 });
      pen.fill();
      pen.globalAlpha = 1;
      pen.stroke();
    }
    canvas.dataset.milliseconds = (performance.now() - began).toFixed(1); // of drawing, for who measures it
  }

  // The views of a product, joined: title, both, picture. Of very many products a part, while the map moves.
  drawLines(ratio) {
    const { numbers, xs, ys, raster } = this, order = ["t", "mm", "i"].filter((view) => numbers.views.includes(view) && this.shown(view)).map((view) => numbers.views.indexOf(view) * numbers.count);
    const step = this.moving ? Math.ceil(numbers.count / MOVING_LINES) : 1, part = numbers.count > 1500 ? 30 : 70;
    for (let place = 0; place < numbers.count; place += step) {
      if (this.strength[place] === FAINT) continue;
      let from = -1;
      for (const start of order) {
        const to = start + place;
        if (xs[to] !== xs[to]) continue;
        if (from >= 0) raster.line(xs[from] * ratio, ys[from] * ratio, xs[to] * ratio, ys[to] * ratio, this.colours.soft, part);
        from = to;
      }
    }
  }

  drawPoints(ratio, size) {
    const { numbers, xs, ys, raster } = this, covers = numbers.views.map((view) => coverOf(view, size * ratio));
    for (const strength of [FAINT, STRONG]) numbers.views.forEach((view, number) => {
      if (!this.shown(view)) return;
      for (let place = 0, k = number * numbers.count; place < numbers.count; place += 1, k += 1) {
        if (xs[k] === xs[k] && this.strength[place] === strength) raster.dot(xs[k] * ratio, ys[k] * ratio, covers[number], this.shades[k], strength);
      }
    });
  }

  // The product that is looked at, in all its views, and lines to what it finds in the full space.
  drawHits(pen, size) {
    const { numbers, xs, ys } = this, active = numbers.place.get(this.model.get("active")) ?? -1, asking = askingOf(this.model, numbers), found = numbers.hits[asking];
    const gallery = numbers.views.indexOf(numbers.views.includes("mm") ? "mm" : numbers.views[0]), ring = (place, colour, width, grow) => numbers.views.forEach((view, number) => {
      const k = number * numbers.count + place;
      if (!this.shown(view) || xs[k] !== xs[k]) return;
      trace(pen, view, xs[k], ys[k], size + grow);
      Object.assign(pen, { strokeStyle: colour, lineWidth: width });
      pen.stroke();
    });
    if (active >= 0 && found) {
      const from = numbers.views.indexOf(asking) * numbers.count + active;
      Object.assign(pen, { strokeStyle: this.colours.accent, lineWidth: 1.5 });
      for (const place of hitsOf(found, active)) {
        const to = gallery * numbers.count + place.place;
        if (xs[from] !== xs[from] || xs[to] !== xs[to]) continue;
        pen.beginPath();
        pen.moveTo(xs[from], ys[from]);
        pen.lineTo(xs[to], ys[to]);
        pen.stroke();
        trace(pen, numbers.views[gallery], xs[to], ys[to], size + 1.5);
        pen.stroke();
      }
      ring(active, this.colours.ink, 2.5, 3.5);
    }
    if (this.hover >= 0) ring(this.hover, this.colours.ink, 2, 2.5);
  }

  // [product, view] of the nearest point that can be seen, or [-1, ""].
  nearest(x, y) {
    let best = -1, away = NEAR ** 2;
    this.each((k, place) => { const far = (this.xs[k] - x) ** 2 + (this.ys[k] - y) ** 2; if (far < away) [best, away] = [k, far]; });
    return best < 0 ? [-1, ""] : [best % this.numbers.count, this.numbers.views[Math.floor(best / this.numbers.count)]];
  }

  // Every point that can be seen and is not filtered out.
  each(visit) {
    this.numbers.views.forEach((view, number) => {
      if (this.shown(view)) for (let place = 0, k = number * this.numbers.count; place < this.numbers.count; place += 1, k += 1) if (this.xs[k] === this.xs[k] && !this.faded(place)) visit(k, place);
    });
  }

  // The next point in a direction from the one that is pointed at; the first from the left to begin with.
  next(dx, dy) {
    const { numbers, xs, ys } = this, from = this.hover < 0 ? -1 : numbers.views.indexOf(this.hoverView) * numbers.count + this.hover;
    let best = from, least = Infinity;
    this.each((k) => {
      const along = from < 0 ? xs[k] : (xs[k] - xs[from]) * dx + (ys[k] - ys[from]) * dy, across = from < 0 ? 0 : Math.abs((xs[k] - xs[from]) * dy) + Math.abs((ys[k] - ys[from]) * dx);
      if ((from < 0 || along > 0.5) && along + 2 * across < least) [best, least] = [k, along + 2 * across];
    });
    return best < 0 ? [-1, ""] : [best % numbers.count, numbers.views[Math.floor(best / numbers.count)]];
  }

  caught() {
    const found = new Set();
    this.each((k, place) => { if (!found.has(place) && inside(this.lasso, this.xs[k], this.ys[k])) found.add(place); });
    return [...found].sort((a, b) => a - b);
  }

  // Nearer or farther, with the point under (x, y) staying where it is.
  scaleBy(factor, x = this.canvas.clientWidth / 2, y = this.canvas.clientHeight / 2) {
    const zoom = Math.min(40, Math.max(1, this.zoom * factor)), dx = (x - this.canvas.clientWidth / 2) / this.scale, dy = (this.canvas.clientHeight / 2 - y) / this.scale, part = 1 - this.zoom / zoom;
    this.centre = zoom === 1 ? null : [this.middle[0] + dx * part, this.middle[1] + dy * part];
    this.zoom = zoom;
  }

  shiftBy(dx, dy) { if (this.zoom > 1) this.centre = [this.middle[0] - dx / this.scale, this.middle[1] + dy / this.scale]; }
}

const askingOf = (model, numbers) => (numbers.views.includes(model.get("asking")) ? model.get("asking") : numbers.views[0]);

function hitsOf(found, place) {
  return range(found.k).map((rank) => ({ place: found.places[place * found.k + rank], score: found.scores[place * found.k + rank] })).filter((hit) => hit.place >= 0);
}

const thumbOf = (numbers, place, css) => { const address = numbers.picture(place); return address ? [make("img", { src: address, alt: "", class: css })] : []; };

// What is known of the product that was chosen, and what it finds.
class Panel {
  constructor(numbers, model, choose) {
    Object.assign(this, { numbers, model, choose, root: make("section", { class: "m2m-panel", "aria-label": "the chosen product" }) });
  }

  draw() {
    const { numbers, model, root } = this, place = numbers.place.get(model.get("active")) ?? -1;
    if (place < 0) {
      root.replaceChildren(make("p", { class: "m2m-soft" }, "Click a point, or press Enter on it: what is known of the product, and what it finds in the full space, stands here."));
      return;
    }
    const asking = askingOf(model, numbers), list = make("select", { "aria-label": "who asks", onchange: () => set(model, { asking: list.value }) }, ...numbers.views.map((view) => make("option", { value: view }, numbers.payload.views[view])));
    list.value = asking;
    const hits = hitsOf(numbers.hits[asking] ?? { k: 0 }, place), id = numbers.payload.ids[place];
    root.replaceChildren(
      make("div", { class: "m2m-product" }, ...thumbOf(numbers, place, "m2m-picture"), make("div", {}, make("b", {}, make("bdi", {}, numbers.title(place))), make("div", { class: "m2m-soft" }, make("bdi", {}, id)), ...(numbers.payload.searches ? [make("button", { onclick: () => model.send({ do: "search", item: id }) }, "Search like this")] : []))),
      make("dl", {}, ...numbers.facts(place).flatMap(([name, value]) => [make("dt", {}, make("bdi", {}, name)), make("dd", {}, make("bdi", {}, value))])),
      make("label", {}, "found in the full space, asked with its", list),
      hits.length ? make("ol", { class: "m2m-hits" }, ...hits.map((hit) => this.hit(id, hit, place, asking))) : make("p", { class: "m2m-soft" }, "Nothing: it has no vector of this kind."),
      ...(numbers.payload.command && hits.length ? [make("p", { class: "m2m-soft" }, "Why the first one? ", make("code", {}, numbers.payload.command.replace("{query}", id).replace("{item}", numbers.payload.ids[hits[0].place])))] : []));
  }

  hit(id, { place, score }, own, asking) {
    const item = this.numbers.payload.ids[place], words = place === own ? "its own product" : this.numbers.title(place);
    const why = this.numbers.payload.explains ? [make("button", { class: "m2m-why", title: "Draw the heatmap of this pair", onclick: () => this.model.send({ do: "explain", query: id, item, view: asking }) }, "why?")] : [];
    return make("li", {}, make("button", { class: "m2m-hit", onclick: () => this.choose(place) }, ...thumbOf(this.numbers, place, "m2m-thumb"), make("bdi", {}, words), make("span", { class: "m2m-score" }, score.toFixed(3))), ...why);
  }
}

function set(model, values) {
  for (const [name, value] of Object.entries(values)) model.set(name, value);
  model.save_changes();
}

// What the lasso or the search caught, as a list.
class Chosen {
  constructor(numbers, model, choose) {
    Object.assign(this, { numbers, model, choose, root: make("section", { class: "m2m-chosen", "aria-label": "selected products" }) });
  }

  draw() {
    const ids = this.model.get("selected"), places = ids.map((id) => this.numbers.place.get(id)).filter((place) => place !== undefined);
    this.root.hidden = !places.length;
    this.root.replaceChildren(...(places.length ? [
      make("p", {}, make("b", {}, `${many(places.length, "product")} selected `), make("button", { onclick: () => set(this.model, { selected: [] }) }, "clear")),
      make("ul", {}, ...places.slice(0, LISTED).map((place) => make("li", {}, make("button", { class: "m2m-hit", onclick: () => this.choose(place) }, ...thumbOf(this.numbers, place, "m2m-thumb"), make("bdi", {}, this.numbers.title(place)))))),
      ...(places.length > LISTED ? [make("p", { class: "m2m-soft" }, `and ${many(places.length - LISTED, "other")}`)] : []),
      make("details", {}, make("summary", {}, "their ids, to copy"), make("textarea", { readonly: true, rows: 4, "aria-label": "ids of the selected products" }, ids.join("\n")))] : []));
  }
}

// What the colours mean; a name can be switched off.
function keyOf(numbers, model, plane, changed) {
  const colour = model.get("colour"), column = numbers.payload.columns[colour];
  const dot = (number) => make("span", { class: `m2m-dot m2m-k${number % COLOURS}` });
  if (colour < 0 || !column) return numbers.views.map((view, number) => make("li", {}, dot(number), `${SIGNS[view]} ${numbers.payload.views[view]}`));
  if (!column.names) return [make("li", {}, short(column.limits[0]), make("span", { class: "m2m-ramp" }), short(column.limits[1]))];
  const counts = new Array(256).fill(0);
  for (const code of numbers.columns[colour]) counts[code] += 1;
  const names = column.names.map((name, number) => make("li", {}, make("button", { "aria-pressed": String(!plane.off.has(number)), onclick: () => { plane.off[plane.off.has(number) ? "delete" : "add"](number); changed(); } }, dot(number), make("bdi", {}, name), ` ${counts[number].toLocaleString("en")}`)));
  return [...names, ...(counts[255] ? [make("li", { class: "m2m-soft" }, make("span", { class: "m2m-dot m2m-unknown" }), `not known ${counts[255].toLocaleString("en")}`)] : [])];
}

function choice(words, options, value, change) {
  const list = make("select", { onchange: () => change(Number(list.value)) }, ...options.map(([number, name]) => make("option", { value: number }, name)));
  list.value = String(value());
  return { root: make("label", {}, make("span", {}, words), list), draw: () => { list.value = String(value()); } };
}

function tick(words, value, change) {
  const box = make("input", { type: "checkbox", onchange: () => change(box.checked) });
  return { root: make("label", { class: "m2m-tick" }, box, words), draw: () => { box.checked = value(); } };
}

// Play, and a slider over the frames of a training; hidden for a projection of one moment.
class Course {
  constructor(numbers, model, plane, draw) {
    Object.assign(this, { numbers, model, plane, redraw: draw, last: 0 });
    this.button = make("button", { onclick: () => this.toggle() }, "▶ play");
    this.slider = make("input", { type: "range", min: 0, step: 1, "aria-label": "moment of the training", oninput: () => { this.stop(); set(model, { frame: Number(this.slider.value) }); } });
    this.label = make("output");
    this.root = make("div", { class: "m2m-course" }, this.button, this.slider, this.label);
  }

  get labels() { return this.numbers.payload.projections[this.model.get("projection")].labels; }

  draw() {
    this.root.hidden = this.labels.length < 2;
    this.slider.max = this.labels.length - 1;
    if (!this.plane.moving) this.plane.at = Math.min(this.model.get("frame"), this.labels.length - 1);
    this.slider.value = Math.round(this.plane.at);
    this.label.textContent = this.labels[Math.round(this.plane.at)];
    this.slider.setAttribute("aria-valuetext", this.label.textContent);
    this.button.textContent = this.plane.moving ? "❚❚ pause" : "▶ play";
  }

  toggle() {
    if (this.plane.moving) return this.stop();
    if (this.plane.at >= this.labels.length - 1) this.plane.at = 0;
    this.plane.moving = true;
    this.last = performance.now();
    this.asked = requestAnimationFrame((now) => this.tick(now));
  }

  // Without smooth motion where the reader asked for less of it.
  tick(now) {
    this.exact = Math.min(this.labels.length - 1, (this.exact ?? this.plane.at) + (now - this.last) / FRAME);
    this.last = now;
    this.plane.at = matchMedia("(prefers-reduced-motion: reduce)").matches ? Math.floor(this.exact) : this.exact;
    if (this.exact >= this.labels.length - 1) return this.stop();
    this.draw();
    this.plane.draw();
    this.asked = requestAnimationFrame((next) => this.tick(next));
  }

  stop() {
    cancelAnimationFrame(this.asked);
    const at = Math.round(this.exact ?? this.plane.at);
    Object.assign(this.plane, { moving: false, at });
    this.exact = undefined;
    if (at !== this.model.get("frame")) set(this.model, { frame: at });
    this.redraw();
  }
}

function render({ model, el }) {
  const payload = model.get("payload"), numbers = new Numbers(payload, model.get("data")), plane = new Plane(numbers, model), canvas = plane.canvas;
  const live = make("p", { class: "m2m-unseen", role: "status", "aria-live": "polite" }), tip = make("div", { class: "m2m-tip", hidden: true }), key = make("ul", { class: "m2m-key" }), status = make("p", { class: "m2m-soft" });
  let asked = 0;
  const soon = () => { cancelAnimationFrame(asked); asked = requestAnimationFrame(draw); };
  const choose = (place) => { set(model, { active: payload.ids[place] }); live.textContent = `${numbers.title(place)} is chosen.`; };
  const panel = new Panel(numbers, model, choose), chosen = new Chosen(numbers, model, choose), course = new Course(numbers, model, plane, soon);
  const search = make("input", { type: "search", "aria-label": "title or id", placeholder: "title or id", oninput: () => { plane.text = search.value.trim().toLowerCase(); point(-1, ""); } });
  const catchAll = make("button", { onclick: () => set(model, { selected: payload.ids.filter((_, place) => !plane.faded(place)) }) }, "select these");
  const lassoTool = make("button", { "aria-pressed": "false", title: "Draw around points to list them; or hold Shift", onclick: () => { lassoTool.setAttribute("aria-pressed", String(!lassoing())); canvas.style.cursor = lassoing() ? "crosshair" : ""; } }, "lasso");
  const lassoing = () => lassoTool.getAttribute("aria-pressed") === "true";
  const zoomBy = (factor) => { if (factor) plane.scaleBy(factor); else Object.assign(plane, { zoom: 1, centre: null }); point(-1, ""); };
  const controls = [
    choice("plane", payload.projections.map((one, number) => [number, one.name]), () => model.get("projection"), (projection) => set(model, { projection, frame: 0 })),
    choice("colour", [[-1, "view"], ...payload.columns.map((one, number) => [number, one.title])], () => model.get("colour"), (colour) => { plane.off.clear(); set(model, { colour }); }),
    ...numbers.views.map((view) => tick(`${SIGNS[view]} ${payload.views[view]}`, () => plane.shown(view), (on) => set(model, { hidden: numbers.views.filter((one) => (one === view ? !on : !plane.shown(one))) }))),
    tick("lines", () => model.get("lines"), (lines) => set(model, { lines }))];
  const root = make("div", { class: "m2m", "data-lm-suppress-shortcuts": "true" },
    make("p", { class: "m2m-heading" }, make("b", {}, "Embedding map"), ...(payload.name ? [" · ", make("bdi", {}, payload.name)] : [])),
    make("div", { class: "m2m-controls", role: "group", "aria-label": "what is shown" }, ...controls.map((one) => one.root), search, catchAll, lassoTool,
      make("span", { class: "m2m-zoom" }, ...[["+", 1.5, "nearer"], ["−", 1 / 1.5, "farther"], ["all", 0, "everything"]].map(([sign, factor, name]) => make("button", { "aria-label": name, title: name, onclick: () => zoomBy(factor) }, sign)))),
    course.root, make("div", { class: "m2m-body" }, make("div", { class: "m2m-left" }, make("div", { class: "m2m-plane" }, canvas, tip), key), make("div", { class: "m2m-right" }, panel.root, chosen.root)), status, live);
  el.append(root);

  function point(place, view) {
    Object.assign(plane, { hover: place, hoverView: view });
    plane.draw();
    tip.hidden = place < 0;
    if (place < 0) return;
    const k = numbers.views.indexOf(view) * numbers.count + place, shown = payload.columns[model.get("colour")]?.title, facts = numbers.facts(place).filter(([name], number) => name === shown || !number).map(([name, value]) => `${name}: ${value}`).join(" · ");
    tip.replaceChildren(...thumbOf(numbers, place, "m2m-picture"), make("div", {}, make("b", {}, make("bdi", {}, numbers.title(place))), make("div", { class: "m2m-soft" }, `${SIGNS[view]} ${payload.views[view]}`, ...(facts ? [" · ", make("bdi", {}, facts)] : []))));
    tip.style.left = `${Math.max(0, Math.min(plane.xs[k] + 14, canvas.clientWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = `${Math.max(0, Math.min(plane.ys[k] + 14, canvas.clientHeight - tip.offsetHeight - 4))}px`;
  }

  function draw() {
    for (const one of controls) one.draw();
    course.draw();
    plane.draw();
    panel.draw();
    chosen.draw();
    key.replaceChildren(...keyOf(numbers, model, plane, soon));
    const projection = payload.projections[model.get("projection")], pictures = payload.pictures.filter(Boolean).length, left = numbers.count < payload.total ? `${numbers.count.toLocaleString("en")} of ${many(payload.total, "product")}, a fixed sample` : many(numbers.count, "product");
    canvas.setAttribute("aria-label", `${projection.name}, ${left}. Arrow keys move from point to point, Enter chooses, plus and minus zoom.`);
    status.textContent = `${projection.about}. ${left}; ${pictures < numbers.count ? `${pictures.toLocaleString("en")} with a picture in this map` : "all with a picture"}. Two points that touch may be far apart where search looks: the lines of a chosen product show what it really finds.`;
  }

  let drag = null;
  const spot = (event) => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  canvas.addEventListener("pointerdown", (event) => {
    const [x, y] = spot(event);
    drag = { x, y, far: 0, lasso: lassoing() || event.shiftKey };
    if (drag.lasso) plane.lasso = [[x, y]];
    if (drag.lasso || plane.zoom > 1) canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = spot(event);
    if (drag && event.buttons) {
      drag.far += Math.hypot(x - drag.x, y - drag.y);
      if (drag.lasso) plane.lasso.push([x, y]); else plane.shiftBy(x - drag.x, y - drag.y);
      Object.assign(drag, { x, y });
      plane.draw();
      return;
    }
    const [place, view] = plane.nearest(x, y);
    if (place !== plane.hover || view !== plane.hoverView) point(place, view);
  });
  canvas.addEventListener("pointerup", (event) => {
    const ended = drag;
    drag = null;
    if (!ended) return;
    if (ended.lasso && ended.far > NEAR) {
      const places = plane.caught();
      plane.lasso = null;
      live.textContent = `${many(places.length, "product")} selected`;
      set(model, { selected: places.map((place) => payload.ids[place]) });
      soon();
    } else if (ended.far < 5) {
      plane.lasso = null;
      const [place] = plane.nearest(...spot(event));
      if (place >= 0) choose(place); else set(model, { active: "" });
    }
  });
  canvas.addEventListener("pointercancel", () => { drag = null; plane.lasso = null; soon(); });
  canvas.addEventListener("pointerleave", () => drag || point(-1, ""));
  canvas.addEventListener("blur", () => point(-1, ""));
  canvas.addEventListener("wheel", (event) => {
    if (!(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    plane.scaleBy(Math.exp(-event.deltaY / 300), ...spot(event));
    point(-1, "");
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const arrow = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (arrow) { point(...plane.next(...arrow)); if (plane.hover >= 0) live.textContent = `${numbers.title(plane.hover)}, ${payload.views[plane.hoverView]}`; }
    else if (event.key === "Enter" && plane.hover >= 0) choose(plane.hover);
    else if (event.key === "Escape") { point(-1, ""); set(model, { active: "", selected: [] }); }
    else if ("+=-0".includes(event.key)) zoomBy({ "+": 1.5, "=": 1.5, "-": 1 / 1.5, 0: 0 }[event.key]);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });

  const repaint = () => { plane.refresh(root); soon(); }, scheme = matchMedia("(prefers-color-scheme: dark)"), resized = new ResizeObserver(soon), themed = new MutationObserver(repaint);
  resized.observe(canvas);
  themed.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "class"] });
  scheme.addEventListener("change", repaint);
  for (const name of TRAITS) model.on(`change:${name}`, soon);
  plane.refresh(root);
  draw();
  return () => {
    cancelAnimationFrame(asked);
    if (plane.moving) course.stop();
    cancelAnimationFrame(asked);
    resized.disconnect();
    themed.disconnect();
    scheme.removeEventListener("change", repaint);
    for (const name of TRAITS) model.off(`change:${name}`, soon);
    numbers.close();
  };
}

export default { render };
