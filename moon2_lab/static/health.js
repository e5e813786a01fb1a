// The map of the health page: products as points, by view and category. It draws what stands in the page and asks nothing of the network. Titles are put in as text, never as HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const VIEWS = Object.keys(data.views), COLOURS = 8, MARGIN = 24, NEAR = 14;
const root = document.getElementById("map"), canvas = make("canvas", { tabindex: "0", role: "img" }), tip = make("div", { class: "tip", hidden: true }), key = make("ul", { class: "key" });
const status = make("p", { class: "soft", role: "status" });
const state = { method: 0, by: data.levels.length ? 0 : -1, shown: new Set(VIEWS.includes("mm") && VIEWS.length > 1 ? ["t", "i"].filter((view) => VIEWS.includes(view)) : VIEWS), text: "", active: -1 };
if (!state.shown.size) VIEWS.forEach((view) => state.shown.add(view));
let points = [];

const colourOf = (number) => getComputedStyle(document.documentElement).getPropertyValue(`--s${number}`).trim();
const groupOf = (product, view) => (state.by < 0 ? VIEWS.indexOf(view) : data.products[product].groups[state.by]);
const namesOf = () => (state.by < 0 ? VIEWS.map((view) => data.views[view]) : data.levels[state.by].names);
const matches = (product) => !state.text || `${data.products[product].id} ${data.products[product].title ?? ""}`.toLowerCase().includes(state.text);

// A square, a triangle or a disc: the view can be told without its colour.
function mark(pen, view, x, y, size) {
  pen.beginPath();
  if (view === "t") pen.rect(x - size, y - size, 2 * size, 2 * size);
  else if (view === "i") { pen.moveTo(x, y - 1.3 * size); pen.lineTo(x + 1.2 * size, y + size); pen.lineTo(x - 1.2 * size, y + size); pen.closePath(); }
  else pen.arc(x, y, size, 0, 2 * Math.PI);
}

function place() {
  const method = data.methods[state.method], spread = [];
  points = [];
  for (const view of VIEWS) if (state.shown.has(view)) method.points[view].forEach((point, product) => { if (point) { points.push({ view, product, at: point }); spread.push(point); } });
  const width = canvas.clientWidth, height = canvas.clientHeight;
  const low = [0, 1].map((axis) => Math.min(...spread.map((point) => point[axis]))), high = [0, 1].map((axis) => Math.max(...spread.map((point) => point[axis])));
  const scale = Math.min((width - 2 * MARGIN) / (high[0] - low[0] || 1), (height - 2 * MARGIN) / (high[1] - low[1] || 1));
  for (const point of points) {
    point.x = width / 2 + (point.at[0] - (low[0] + high[0]) / 2) * scale;
    point.y = height / 2 - (point.at[1] - (low[1] + high[1]) / 2) * scale;
  }
}

function draw() {
  const ratio = devicePixelRatio || 1, pen = canvas.getContext("2d"), colours = range(COLOURS).map(colourOf);
  [canvas.width, canvas.height] = [canvas.clientWidth * ratio, canvas.clientHeight * ratio];
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  place();
  for (const there of [false, true]) for (const point of points) {
    if (matches(point.product) !== there) continue;
    pen.globalAlpha = there ? 0.75 : 0.12;
    pen.fillStyle = colours[groupOf(point.product, point.view) % COLOURS];
    mark(pen, point.view, point.x, point.y, state.text && there ? 4.5 : 3);
    pen.fill();
  }
  pen.globalAlpha = 1;
  const active = points[state.active];
  if (active) {
    pen.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--ink");
    pen.lineWidth = 2;
    for (const point of points) if (point.product === active.product) { mark(pen, point.view, point.x, point.y, 7); pen.stroke(); }
  }
  const names = namesOf();
  const found = new Set(points.filter((point) => matches(point.product)).map((point) => point.product)).size;
  canvas.setAttribute("aria-label", `${data.methods[state.method].name}: ${points.length} vectors`);
  key.replaceChildren(...names.map((name, number) => make("li", {}, make("span", { class: `dot k${number % COLOURS}` }), make("bdi", {}, name))));
  status.textContent = `${data.methods[state.method].about}. ${found.toLocaleString("en")} of ${data.total.toLocaleString("en")} products; ■ title, ▲ picture, ● both.`;
}

function tell(number) {
  state.active = number;
  const point = points[number];
  tip.hidden = !point;
  draw();
  if (!point) return;
  const product = data.products[point.product], groups = product.groups.map((group, level) => data.levels[level].names[group]).join(" > ");
  tip.replaceChildren(make("b", {}, make("bdi", {}, product.title || "no title")), make("br"), make("bdi", {}, product.id), ` · ${data.views[point.view]}`, ...(groups ? [make("br"), make("bdi", {}, groups)] : []));
  tip.style.left = `${Math.min(point.x + 12, Math.max(0, canvas.clientWidth - tip.offsetWidth - 4))}px`;
  tip.style.top = `${Math.min(point.y + 12, Math.max(0, canvas.clientHeight - tip.offsetHeight - 4))}px`;
}

function nearest(x, y) {
  let best = -1, away = NEAR ** 2;
  points.forEach((point, number) => { const far = (point.x - x) ** 2 + (point.y - y) ** 2; if (far < away && matches(point.product)) [best, away] = [number, far]; });
  return best;
}

// The next point in a direction, from the one that is pointed at; the first one from the left to begin with.
function step(dx, dy) {
  const from = points[state.active];
  if (!from) return points.findIndex((point) => matches(point.product));
  let best = state.active, least = Infinity;
  points.forEach((point, number) => {
    const along = (point.x - from.x) * dx + (point.y - from.y) * dy, across = Math.abs((point.x - from.x) * dy) + Math.abs((point.y - from.y) * dx);
    if (along > 0.5 && along + 2 * across < least && matches(point.product)) [best, least] = [number, along + 2 * across];
  });
  return best;
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
canvas.addEventListener("pointermove", (event) => { const number = nearest(event.offsetX, event.offsetY); if (number !== state.active) tell(number); });
canvas.addEventListener("pointerleave", () => tell(-1));
canvas.addEventListener("keydown", (event) => { if (event.key in ARROWS) { event.preventDefault(); tell(step(...ARROWS[event.key])); } else if (event.key === "Escape") tell(-1); });
canvas.addEventListener("blur", () => tell(-1));

function select(words, options, value, change) {
  const made = make("select", { onchange: () => { change(Number(made.value)); tell(-1); } }, ...options.map(([number, name]) => make("option", { value: String(number) }, name)));
  made.value = String(value);
  return make("label", {}, words, made);
}

const checks = VIEWS.map((view) => {
  const box = make("input", { type: "checkbox", name: view, onchange: () => { state.shown[box.checked ? "add" : "delete"](view); tell(-1); } });
  box.checked = state.shown.has(view);
  return make("label", { class: "check" }, box, data.views[view]);
});
const search = make("input", { type: "search", name: "text", oninput: () => { state.text = search.value.trim().toLowerCase(); tell(-1); } });
root.replaceChildren(
  make("div", { class: "controls" }, select("projection", data.methods.map((method, number) => [number, method.name]), 0, (value) => { state.method = value; }),
    select("colour", [[-1, "view"], ...data.levels.map((level, number) => [number, level.title])], state.by, (value) => { state.by = value; }), ...checks, make("label", {}, "title or id", search)),
  make("div", { class: "plane" }, canvas, tip), status, key);
new ResizeObserver(() => draw()).observe(canvas);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
