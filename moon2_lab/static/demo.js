() => {
  // What the page does by itself: the address follows what was asked, and a frame takes the height of what is in it.
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
  // A heatmap is a page of its own, which follows the system's theme; here it follows this page's.
  const dressed = (frame) => {
    const theme = `data-jp-theme-light="${!document.body.classList.contains("dark")}"`;
    if (frame.srcdoc.includes('<html lang="en">')) frame.srcdoc = frame.srcdoc.replace('<html lang="en">', `<html lang="en" ${theme}>`).replace("\n<body>", `\n<body ${theme}>`);
  };
  new MutationObserver(() => document.querySelectorAll("iframe.heat").forEach(dressed)).observe(document.body, { childList: true, subtree: true });
  addEventListener("message", (event) => {
    for (const frame of document.querySelectorAll("iframe.heat"))
      if (event.source === frame.contentWindow && event.data?.moon2Height > 0) frame.style.height = `${Math.min(4000, event.data.moon2Height + 4)}px`;
  });
}
