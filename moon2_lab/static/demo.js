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
  const changed = (asked, picture) => {
    keep({ ...asked, hit: "", of: "" }, picture);
    if (picture) document.querySelector("#moon2-picture button.label-wrap:not(.open)")?.click(); // what is asked with is seen
  };
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
      if (!narrow()) return;
      for (const fold of ["options", ...(kept() ? [] : ["picture"])]) document.querySelector(`#moon2-${fold} button.label-wrap.open`)?.click(); // the hits come first
    },
  };
  const here = new URL(location.href);
  if (here.searchParams.get("tab") === "search") { // the same without
    here.searchParams.delete("tab");
    history.replaceState(history.state, "", here);
  }
  const searchLike = (product) => { // of the map: a step of the history, and what the address asks for is done
    keep({ tab: "", q: `id:${product}`, hit: "", of: "" }, null);
    filling = true;
    document.getElementById("moon2-back")?.click();
  };
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

  // Judgements: query -> product id -> 1 (it fits) or 0. They stay in this tab of the browser; the server never gets them.
  const judged = new Map();
  try {
    for (const [query, grades] of Object.entries(JSON.parse(sessionStorage.getItem("moon2Judged") ?? "{}"))) judged.set(query, new Map(Object.entries(grades)));
  } catch { /* no storage is allowed here: they live as long as the page */ }
  const judgements = () => JSON.stringify(Object.fromEntries([...judged].map(([query, grades]) => [query, Object.fromEntries(grades)])), null, 1);
  const asked = () => {
    const box = document.querySelector("#moon2-judging [data-hits]");
    return box ? { query: box.dataset.query, hits: JSON.parse(box.dataset.hits), box } : { query: "", hits: {} };
  };
  const THUMBS = [[1, "fits the query", ""], [0, "does not fit the query", "rotate(180 12 12)"]];
  const drawing = (turn) => { // a thumb, for a button
    const [svg, path] = ["svg", "path"].map((name) => document.createElementNS("http://www.w3.org/2000/svg", name));
    for (const [name, value] of Object.entries({ viewBox: "0 0 24 24", width: 18, height: 18, "aria-hidden": "true" })) svg.setAttribute(name, value);
    path.setAttribute("d", "M3 11h4v10H3zM9 21V11l4-8c1.7 0 2.6 1.3 2.2 3l-.8 4H19c1.5 0 2.3 1.2 2 2.6l-1.6 6.6c-.3 1.1-1 1.8-2.2 1.8z");
    if (turn) path.setAttribute("transform", turn);
    svg.append(path);
    return svg;
  };
  const thumbs = () => {
    const row = document.createElement("div");
    row.className = "moon2-thumbs";
    for (const [grade, , turn] of THUMBS) {
      const button = document.createElement("button");
      Object.assign(button, { type: "button" }).dataset.grade = grade;
      button.append(drawing(turn));
      row.append(button);
    }
    return row;
  };
  const showJudged = () => { // thumbs under the cards as they are now; nothing is changed that is right already
    const { query, hits, box } = asked(), grades = judged.get(query);
    for (const [letter, gallery] of [..."AB"].map((one) => [one, document.getElementById(`moon2-hits-${one}`)])) {
      [...gallery?.querySelectorAll(".gallery-item") ?? []].forEach((card, place) => {
        const product = query && hits[letter]?.[place], there = card.querySelector(":scope > .moon2-thumbs");
        if (!product) { there?.remove(); return; }
        const row = there ?? card.appendChild(thumbs());
        row.dataset.product = product;
        [...row.children].forEach((button, number) => {
          button.setAttribute("aria-pressed", String(grades?.get(product) === THUMBS[number][0]));
          button.title = THUMBS[number][1];
          button.setAttribute("aria-label", `Hit ${place + 1} ${THUMBS[number][1]}`);
        });
      });
    }
    const count = [...judged.values()].reduce((sum, one) => sum + one.size, 0), line = box?.querySelector(".judged");
    const many = (number, word, words) => `${number.toLocaleString("en")} ${number === 1 ? word : words}`;
    const words = count ? `${many(count, "judgement", "judgements")} of ${many(judged.size, "query", "queries")}, kept in this tab` : "Nothing is judged yet.";
    if (line && line.textContent !== words) line.textContent = words;
    box?.querySelectorAll("[data-do]").forEach((button) => { button.hidden = !count; });
  };
  const judge = (query, product, grade) => {
    const grades = judged.get(query) ?? new Map();
    if (grades.get(product) === grade) grades.delete(product);
    else grades.set(product, grade);
    if (grades.size) judged.set(query, grades);
    else judged.delete(query);
  };
  const save = () => {
    const address = URL.createObjectURL(new Blob([judgements()], { type: "application/json" }));
    Object.assign(document.createElement("a"), { href: address, download: "judgements.json" }).click();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
  };
  addEventListener("click", ({ target }) => {
    const button = target.closest?.(".moon2-thumbs button, #moon2-judging [data-do]");
    if (!button) return;
    if (button.dataset.do === "save") return save();
    if (button.dataset.do === "forget") judged.clear();
    else judge(asked().query, button.parentElement.dataset.product, Number(button.dataset.grade));
    try { sessionStorage.setItem("moon2Judged", judgements()); } catch { /* as above */ }
    showJudged();
  });
  let drawn = 0;
  new MutationObserver(() => { cancelAnimationFrame(drawn); drawn = requestAnimationFrame(showJudged); }).observe(document.body, { childList: true, subtree: true });
  const warm = document.createElement("iframe"); // stays, so that the browser keeps the process of closed-off frames: a heatmap need not wait for a new one
  warm.sandbox = "allow-scripts"; warm.srcdoc = "<!doctype html><title>empty</title>"; warm.title = "empty"; warm.hidden = true;
  document.body.append(warm);
  addEventListener("message", (event) => {
    const frame = [...document.querySelectorAll("iframe.heat")].find((one) => one.contentWindow === event.source);
    if (frame && event.data?.moon2Asked?.do === "search") searchLike(String(event.data.moon2Asked.item));
    if (!frame || !(event.data?.moon2Height > 0)) return;
    frame.style.height = `${Math.min(4000, event.data.moon2Height + 4)}px`;
    frame.contentWindow.postMessage({ moon2Light: !document.body.classList.contains("dark") }, "*"); // a page of its own would follow the system's theme
  });
}
