() => {
  // What the page does by itself: the address follows what was asked, each search, opened hit and tab is a step of the history, and a frame takes the height of what is in it and gets the page's theme.
  const narrow = () => innerWidth < 768; // there the answer is below all the boxes
  const show = (element, block) => element?.scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth", block });
  let folded = false; // the options, once
  let filling = true; // the boxes are being filled from the address: a tab that opens meanwhile was not clicked
  const kept = () => history.state?.moon2Picture ?? null;
  const keep = (asked, picture = kept()) => {
    const address = new URL(location.href);
    for (const [name, value] of Object.entries(asked)) {
      if (value === null || value === undefined || value === "") address.searchParams.delete(name);
      else address.searchParams.set(name, value);
    }
    const same = address.searchParams.toString() === new URL(location.href).searchParams.toString();
    if (same && picture?.path === kept()?.path) return;
    history.pushState({ moon2Picture: picture && JSON.parse(JSON.stringify(picture)) }, "", address); // as a plain object
  };
  const changed = (asked, picture) => keep({ ...asked, hit: "", of: "" }, picture);
  window.moon2 = {
    keep, changed,
    toTab: (name) => filling || keep({ tab: name }),
    searched: (asked, picture) => { changed(asked, picture); if (narrow()) show(document.querySelector(".moon2-hits"), "start"); },
    explained: (asked) => { keep(asked); if (narrow()) show(document.getElementById("moon2-pair"), "start"); },
    toDetails: (opened) => { // "letter id"
      const cut = opened.indexOf(" ");
      keep({ of: opened.slice(0, cut), hit: opened.slice(cut + 1) });
      show(document.getElementById("moon2-details"), "nearest");
    },
    picture: kept,
    address: () => location.search + (kept() ? "&picture=1" : ""),
    filled: () => {
      setTimeout(() => { filling = false; }, 300);
      if (folded) return;
      folded = true;
      if (narrow()) document.querySelector("#moon2-options button.label-wrap.open")?.click(); // the hits come first
    },
  };
  const here = new URL(location.href);
  if (here.searchParams.get("tab") === "search") { // the same without
    here.searchParams.delete("tab");
    history.replaceState(history.state, "", here);
  }
  addEventListener("popstate", () => { filling = true; document.getElementById("moon2-back")?.click(); });
  const waiting = {}; // what is typed is sent after a short quiet: of the calls of one name only the last is ever answered
  window.moon2.settled = (name, given) => {
    document.getElementById(`moon2-${name}-shown`)?.classList.add("moon2-old");
    clearTimeout(waiting[name]);
    return new Promise((done) => { waiting[name] = setTimeout(() => done(given), 350); });
  };
  addEventListener("input", ({ target }) => { // Gradio tells nobody of a box that was emptied
    if (target.matches("#moon2-edit textarea, #moon2-edit input[data-testid=textbox]") && !target.value) setTimeout(() => document.getElementById("moon2-edit-emptied")?.click());
  });
  window.moon2.fresh = (id) => document.getElementById(id)?.classList.remove("moon2-old");
  addEventListener("message", (event) => {
    const frame = [...document.querySelectorAll("iframe.heat")].find((one) => one.contentWindow === event.source);
    if (!frame || !(event.data?.moon2Height > 0)) return;
    frame.style.height = `${Math.min(4000, event.data.moon2Height + 4)}px`;
    frame.contentWindow.postMessage({ moon2Light: !document.body.classList.contains("dark") }, "*"); // a page of its own would follow the system's theme
  });
}
