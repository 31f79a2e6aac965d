"use strict";
// Draws the figures that the page brings along; where the page is of a run that is under way, asks for new ones.
(() => {
  const root = document.documentElement;
  const main = document.getElementById("page");
  const preview = document.getElementById("preview");
  const signal = document.getElementById("signal");
  const finger = matchMedia("(pointer: coarse)");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const SECONDS = 3;
  const BUTTONS = ["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"];
  let figures = JSON.parse(document.getElementById("data").textContent).figures;

  // Colours are CSS variables, so that a figure is right in the dark and in the light.
  function coloured(value, style) {
    if (typeof value === "string") {
      return value.startsWith("var(--") ? style.getPropertyValue(value.slice(4, -1)).trim() : value;
    }
    if (Array.isArray(value)) {
      return value.map((inner) => coloured(inner, style));
    }
    if (value === null || typeof value !== "object") {
      return value;
    }
    return Object.fromEntries(Object.entries(value).map(([name, inner]) => [name, coloured(inner, style)]));
  }

  function draw(node) {
    const figure = figures[node.dataset.figure];
    const style = getComputedStyle(root);
    const layout = coloured(figure.layout, style);
    layout.modebar = { bgcolor: "rgba(0,0,0,0)", color: layout.font.color, orientation: "h" };
    if (finger.matches) {
      layout.dragmode = false; // a finger that moves over a plot scrolls the page; the buttons zoom
      layout.margin.t = 32; // they stay in sight
    }
    let more = 0;
    if (layout.showlegend && node.clientWidth < 480) { // room for a legend of two columns
      layout.legend.entrywidth = 0.28 * node.clientWidth;
      more = 20 * Math.ceil(figure.data.length / 2);
    }
    const square = layout.yaxis.scaleanchor !== undefined;
    node.style.height = `${more + (square ? Math.min(node.dataset.height, node.clientWidth) : Number(node.dataset.height))}px`;
    node.drawn = figure;
    const first = !node.classList.contains("js-plotly-plot");
    Plotly.react(node, coloured(figure.data, style), layout, {
      responsive: true,
      displaylogo: false,
      displayModeBar: finger.matches ? true : "hover",
      // Named one by one: plotly's own choice has a button that sends the plot to a server of theirs.
      modeBarButtons: [finger.matches ? BUTTONS : [...BUTTONS, "toImage"]],
    });
    if (first && figure.pictures) {
      node.on("plotly_hover", (event) => show(event, figures[node.dataset.figure].pictures));
      node.on("plotly_unhover", () => { preview.hidden = true; });
    }
  }

  function drawAll() {
    document.querySelectorAll(".plot").forEach(draw);
  }

  // The image of a point of the map, cut out of the sheet of all images.
  function show(event, pictures) {
    const number = event.points[0].customdata;
    const wide = 96;
    const box = event.event.target.getBoundingClientRect();
    const x = event.event.clientX ?? box.left, y = event.event.clientY ?? box.top;
    preview.style.backgroundImage = `url("${pictures.source}")`;
    preview.style.backgroundSize = `${pictures.columns * wide}px ${pictures.rows * wide}px`;
    const left = (number % pictures.columns) * wide, top = Math.floor(number / pictures.columns) * wide;
    preview.style.backgroundPosition = `-${left}px -${top}px`;
    preview.style.left = `${Math.min(Math.max(8, x - wide - 16), innerWidth - wide - 12)}px`;
    preview.style.top = `${Math.min(Math.max(8, y - wide - 16), innerHeight - wide - 12)}px`;
    preview.hidden = false;
  }

  drawAll();
  dark.addEventListener("change", drawAll);
  addEventListener("scroll", () => { preview.hidden = true; }, { passive: true });
  addEventListener("beforeprint", () => { root.dataset.paper = "white"; drawAll(); });
  addEventListener("afterprint", () => { delete root.dataset.paper; drawAll(); });

  // A run that is under way

  const poll = document.body.dataset.poll;
  if (poll === undefined) return;
  const shown = {};
  let version = "", misses = 0, answered = new Date();

  function replace(name, html, before) {
    let part = document.getElementById(name);
    if (part === null) {
      part = document.createElement("section");
      part.id = name;
      part.setAttribute("aria-labelledby", `${name}-title`);
      before === null ? main.prepend(part) : before.after(part);
    }
    if (shown[name] === html) return part;
    shown[name] = html;
    const template = document.createElement("template");
    template.innerHTML = html;
    for (const hole of template.content.querySelectorAll(".plot")) { // plots stay, with their zoom
      const old = document.getElementById(hole.id);
      if (old !== null && part.contains(old)) hole.replaceWith(old);
    }
    const open = [...part.querySelectorAll("details")].map((details) => details.open);
    template.content.querySelectorAll("details").forEach((details, place) => { details.open = open[place] ?? false; });
    const scrolled = [...part.querySelectorAll(".scroll, ul")].map((box) => box.scrollLeft);
    part.replaceChildren(template.content);
    part.querySelectorAll(".scroll, ul").forEach((box, place) => { box.scrollLeft = scrolled[place] ?? 0; });
    return part;
  }

  function take(state) {
    figures = state.figures;
    let before = null;
    for (const [name, html] of Object.entries(state.parts)) {
      const part = replace(name, html, before);
      if (part.tagName === "SECTION") before = part;
    }
    for (const node of document.querySelectorAll(".plot")) {
      if (JSON.stringify(node.drawn) !== JSON.stringify(figures[node.dataset.figure])) draw(node);
    }
  }

  async function ask() {
    let ended = false;
    try {
      const answer = await fetch(`${poll}?have=${version}`, { cache: "no-store" });
      if (answer.status === 200) {
        const state = await answer.json();
        version = answer.headers.get("etag") ?? "";
        take(state);
        ended = state.ended;
      } else if (answer.status !== 204) {
        throw new Error(await answer.text());
      }
      misses = 0;
      answered = new Date();
      signal.hidden = true;
    } catch (error) {
      misses += 1;
      if (misses > 1) {
        const reason = error instanceof TypeError ? "the run has ended, or its machine cannot be reached" : error.message;
        signal.textContent = `No answer since ${answered.toLocaleTimeString()}: ${reason}. What is below is the last that was heard.`;
        signal.hidden = false;
      }
    }
    root.dataset.ended = ended;
    if (!ended) setTimeout(ask, 1000 * SECONDS);
  }

  ask();
})();
