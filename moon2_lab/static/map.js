// A widget in a page of its own: a model that lives in the page instead of a kernel.
const state = JSON.parse(document.getElementById("state").textContent), heard = {};
state.data = Uint8Array.from(atob(state.data), (letter) => letter.charCodeAt(0));
const model = {
  get: (name) => state[name],
  set: (name, value) => { state[name] = value; for (const listener of heard[`change:${name}`] ?? []) listener(); },
  on: (name, listener) => { (heard[name] ??= new Set()).add(listener); },
  off: (name, listener) => heard[name]?.delete(listener),
  save_changes: () => {},
  send: (asked) => { if (parent !== window) parent.postMessage({ moon2Asked: asked }, "*"); }, // the page around it may answer
};
render({ model, el: document.querySelector("[data-widget]") });
if (parent !== window) { // in a frame: it tells its height, and takes the theme of the page around it
  addEventListener("message", (event) => {
    if (event.source !== parent || typeof event.data?.moon2Light !== "boolean") return;
    for (const element of [document.documentElement, document.body]) element.dataset.jpThemeLight = event.data.moon2Light;
  });
  new ResizeObserver(() => parent.postMessage({ moon2Height: document.body.scrollHeight }, "*")).observe(document.body);
}
