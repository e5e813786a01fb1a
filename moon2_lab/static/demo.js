() => {
  // What the page does by itself: the address follows what was asked, and a frame takes the height of what is in it and gets the page's theme.
  const narrow = () => innerWidth < 768; // there the answer is below all the boxes
  const show = (element, block) => element?.scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth", block });
  const keep = (asked) => {
    const address = new URL(location.href);
    for (const [name, value] of Object.entries(asked)) {
      if (value === null || value === undefined || value === "") address.searchParams.delete(name);
      else address.searchParams.set(name, value);
    }
    history.replaceState(history.state, "", address);
  };
  window.moon2 = {
    keep,
    searched: (asked) => { keep(asked); if (narrow()) show(document.querySelector(".moon2-hits"), "start"); },
    explained: (asked) => { keep(asked); if (narrow()) show(document.getElementById("moon2-pair"), "start"); },
    toDetails: () => show(document.getElementById("moon2-details"), "nearest"),
  };
  const waiting = {}; // what is typed is sent after a short quiet: of the calls of one name only the last is ever answered
  window.moon2.settled = (name, given) => {
    document.getElementById(`moon2-${name}-shown`)?.classList.add("moon2-old");
    clearTimeout(waiting[name]);
    return new Promise((done) => { waiting[name] = setTimeout(() => done(given), 350); });
  };
  window.moon2.fresh = (id) => document.getElementById(id)?.classList.remove("moon2-old");
  addEventListener("message", (event) => {
    const frame = [...document.querySelectorAll("iframe.heat")].find((one) => one.contentWindow === event.source);
    if (!frame || !(event.data?.moon2Height > 0)) return;
    frame.style.height = `${Math.min(4000, event.data.moon2Height + 4)}px`;
    frame.contentWindow.postMessage({ moon2Light: !document.body.classList.contains("dark") }, "*"); // a page of its own would follow the system's theme
  });
}
