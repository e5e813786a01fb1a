// What if: the step that is due, as configured and with other settings, side by side. The kernel computes between two steps; the last setting wins.
// Nothing is asked of the network. Names are put in as text, never as HTML.

const QUIET = 300; // milliseconds without a change before it is sent
const written = (value, digits = 3) => (Number.isFinite(value) ? value.toFixed(digits) : "–");

// Rows of (name, now, changed, difference in words) as pairs of bars.
function pairs(title, rows) {
  const most = rows.reduce((all, [, now, changed]) => Math.max(all, now ?? 0, changed ?? 0), 1e-9);
  const bar = (kind, words, value) => {
    const fill = make("span", { class: `m2s-fill m2s-${kind}`, "aria-hidden": "true" });
    fill.style.width = `${(100 * Math.max(0, value ?? 0)) / most}%`;
    return make("div", { class: "m2s-bar" }, make("span", { class: "m2s-track" }, fill), make("span", { class: "m2s-number" }, make("span", { class: "m2s-unseen" }, `${words}: `), written(value)));
  };
  const body = rows.map(([name, now, changed, words]) => make("tr", { "data-name": name }, make("th", { scope: "row" }, make("bdi", {}, name)), make("td", {}, bar("now", "as configured", now), bar("changed", "changed", changed)), make("td", { class: words === "no difference" ? "m2s-soft" : "m2s-words" }, words)));
  const head = make("tr", {}, ...["", "as configured, and changed", "difference"].map((name) => make("th", { scope: "col" }, name)));
  return make("table", {}, make("caption", {}, title), make("thead", { class: "m2s-unseen" }, head), make("tbody", {}, ...body));
}

// A slider over given numbers, or a list of words: { name, get, set, element }.
function control({ name, title, configured, choices, change }) {
  const words = typeof configured === "string", said = (value) => `${value}${value === configured ? " (as configured)" : ""}`;
  const output = make("output"), box = words ? make("select", { onchange: () => change() }, ...choices.map((choice) => make("option", { value: choice }, said(choice))))
    : make("input", { type: "range", min: 0, max: choices.length - 1, step: 1, oninput: () => { tell(); change(); } });
  const get = () => (words ? box.value : choices[Number(box.value)]);
  const tell = () => { if (!words) { output.textContent = said(get()); box.setAttribute("aria-valuetext", said(get())); } };
  const set = (value) => { box.value = words ? value : Math.max(0, choices.indexOf(value)); tell(); };
  return { name, get, set, configured, element: make("label", { "data-control": name }, make("span", {}, title), output, box) };
}

function render({ model, el }) {
  let timer = 0, drawn = null;
  const send = () => {
    clearTimeout(timer);
    timer = 0;
    model.set("asked", { number: (model.get("asked").number ?? 0) + 1, ...Object.fromEntries(controls.map((each) => [each.name, each.get()])) });
    model.save_changes();
    kernel.ask();
    draw();
  };
  const later = () => { clearTimeout(timer); timer = setTimeout(send, QUIET); draw(); };
  const controls = model.get("settings").map(([name, title, configured, choices]) => control({ name, title, configured, choices, change: later }));
  const again = make("button", { type: "button", onclick: send }, "compare at the step of now");
  const reset = make("button", { type: "button", onclick: () => { for (const each of controls) each.set(each.configured); send(); } }, "as configured");
  const boxes = make("fieldset", {}, make("legend", {}, "What if the next step had other settings?"), ...controls.map((each) => each.element), reset, again);
  const status = make("p", { class: "m2s-status", role: "status", "aria-live": "polite" }), wrong = make("p", { class: "m2s-wrong", role: "alert" }), answer = make("div", { class: "m2s-answer" });
  const root = make("div", { class: "m2s", role: "group", "aria-label": "what if", "data-lm-suppress-shortcuts": "true" }, boxes, status, wrong, answer);

  function draw() {
    const shown = model.get("shown"), ready = model.get("ready"), gone = kernel.heard === false;
    const waits = !gone && (timer !== 0 || (model.get("asked").number ?? 0) > shown.number);
    boxes.disabled = gone || !ready;
    answer.classList.toggle("m2s-old", waits || Boolean(shown.error));
    answer.setAttribute("aria-busy", waits);
    wrong.textContent = shown.error && !waits ? shown.error : "";
    wrong.hidden = !wrong.textContent;
    status.textContent = gone ? "No kernel answers. This is the last comparison; another one needs a running kernel: run the cell again."
      : !ready ? "The settings can be tried after the first step." : waits && kernel.quiet ? "No answer from the kernel yet: it is busy, or it was stopped."
      : waits ? "Computing, between two steps of the run; the run itself is not changed." : shown.summary || "Move a slider, or choose a mode: the next step is taken twice, and neither is kept. The run is not changed.";
    if (drawn === shown) return;
    drawn = shown;
    answer.replaceChildren(...(shown.losses ? [make("p", { class: "m2s-key" }, make("span", { class: "m2s-sample m2s-now" }), "as configured", make("span", { class: "m2s-sample m2s-changed" }), shown.changed),
      make("div", { class: "m2s-tables" }, pairs("Loss terms", shown.losses), ...(shown.omega.length ? [pairs("Objective weights ω", shown.omega)] : [])), make("p", { class: "m2s-soft" }, shown.note)] : []));
  }

  const kernel = new Kernel(model, draw);
  const asked = () => { const now = model.get("asked"); if (timer === 0) for (const each of controls) each.set(now[each.name] ?? each.configured); draw(); };
  const traits = { "change:shown": draw, "change:ready": draw, "change:asked": asked };
  el.append(root);
  for (const [name, hear] of Object.entries(traits)) model.on(name, hear);
  asked();
  kernel.ask();
  return () => {
    clearTimeout(timer);
    kernel.close();
    for (const [name, hear] of Object.entries(traits)) model.off(name, hear);
  };
}

export default { render };
