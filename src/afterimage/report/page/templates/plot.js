// Shared parts of the charts: scales, axes, markers, points to hover, focus and choose, and the tooltip.
const MARKERS = [
  "M4.5 0A4.5 4.5 0 1 1-4.5 0A4.5 4.5 0 1 1 4.5 0Z", "M-4-4H4V4H-4Z", "M0-5.4L5 3.6H-5Z", "M0-5.8L5 0L0 5.8L-5 0Z",
  "M0 5.4L5-3.6H-5Z", "M-1.6-5H1.6V-1.6H5V1.6H1.6V5H-1.6V1.6H-5V-1.6H-1.6Z", "M0-5.2L4.9-1.6L3.1 4.2H-3.1L-4.9-1.6Z",
];
const DASHES = ["none", "6 3", "2 3", "8 3 2 3", "12 4", "1 3"];
const COLOURS = 8;
const REACH = 28;

const linear = (from, to) => (value) => to[0] + ((value - from[0]) / (from[1] - from[0] || 1)) * (to[1] - to[0]);

function niceTicks(low, high, count) {
  const raw = (high - low || 1) / count;
  const size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * size).find((s) => s >= raw);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i += 1) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

function logTicks(low, high) {
  const all = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e += 1) {
    for (const m of [1, 2, 5]) all.push(m * 10 ** e);
  }
  const inside = all.filter((t) => t >= low * 0.999 && t <= high * 1.001);
  const tens = inside.filter((t) => Number.isInteger(Math.log10(t)));
  return inside.length > 6 && tens.length > 1 ? tens : inside;
}

function padded(values, share = 0.06) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const pad = (high - low || Math.abs(high) || 1) * share;
  return [low - pad, high + pad];
}

function yAxis(chart, ticks, y, left, right, text) {
  for (const tick of ticks) {
    chart.append(
      svg("line", { class: "grid", x1: left, x2: right, y1: y(tick), y2: y(tick) }),
      svg("text", { class: "tick", x: left - 8, y: y(tick), dy: "0.32em", "text-anchor": "end" }, text(tick)),
    );
  }
}

function xAxis(chart, ticks, x, top, bottom, text) {
  for (const tick of ticks) {
    chart.append(
      svg("line", { class: "grid", x1: x(tick), x2: x(tick), y1: top, y2: bottom }),
      svg("text", { class: "tick", x: x(tick), y: bottom + 18, "text-anchor": "middle" }, text(tick)),
    );
  }
}

const tickText = (value) => String(Number(value.toPrecision(6))).replace("-", MINUS);

/** Cut text to a width in pixels, in a font of about 12 pixels. */
function cut(text, width) {
  const most = Math.max(3, Math.floor(width / 6.4));
  return text.length <= most ? text : `${text.slice(0, most - 1)}…`;
}

function marker(point) {
  return svg("path", { class: `mark c${point.colour}`, d: MARKERS[point.shape % MARKERS.length], transform: `translate(${point.x} ${point.y})` });
}

/**
 * Add points `{x, y, colour, shape, lines, image, choose}` to a chart. The chart is one stop of the Tab key, arrow keys
 * go from point to point in the given order, Enter chooses; the pointer finds the nearest point within reach.
 */
function addPoints(chart, points) {
  if (points.length === 0) return;
  const nodes = points.map((point, index) => svg(
    "g",
    { class: `point${point.current ? " current" : ""}`, role: "button", tabindex: index === 0 ? 0 : -1, "aria-label": point.lines.join(", ") },
    svg("circle", { class: "ring", cx: point.x, cy: point.y, r: 9 }), marker(point),
  ));
  chart.append(svg("g", {}, ...nodes));
  const show = (index) => {
    nodes.forEach((node, other) => node.classList.toggle("hot", other === index));
    if (index < 0) hideTip();
    else showTip(nodes[index], points[index]);
  };
  const focus = (index) => {
    nodes.forEach((node, other) => node.setAttribute("tabindex", other === index ? 0 : -1));
    nodes[index].focus();
  };
  nodes.forEach((node, index) => {
    node.addEventListener("focus", () => show(index));
    node.addEventListener("blur", () => show(-1));
    node.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, Home: -Infinity, End: Infinity };
      if (event.key in steps) focus(clamp(index + steps[event.key], 0, nodes.length - 1));
      else if (event.key === "Enter" || event.key === " ") points[index].choose?.();
      else if (event.key === "Escape") show(-1);
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
  });
  const nearest = (event) => {
    const box = chart.getBoundingClientRect();
    const gaps = points.map((p) => Math.hypot(p.x - (event.clientX - box.left), p.y - (event.clientY - box.top)));
    const index = gaps.indexOf(Math.min(...gaps));
    return gaps[index] <= REACH ? index : -1;
  };
  chart.addEventListener("pointermove", (event) => show(nearest(event)));
  chart.addEventListener("pointerleave", () => show(-1));
  chart.addEventListener("click", (event) => {
    const index = nearest(event);
    if (index >= 0) points[index].choose?.();
  });
}

function showTip(node, point) {
  const tip = byId("tooltip");
  const [title, ...lines] = point.lines;
  tip.replaceChildren(
    ...(point.image ? [el("img", { src: point.image, alt: "", width: 72, height: 72 })] : []),
    el("div", {}, el("strong", {}, title), ...lines.map((line) => el("div", {}, line))),
  );
  tip.hidden = false;
  const at = node.getBoundingClientRect();
  const left = clamp(at.left + at.width / 2 - tip.offsetWidth / 2, 8, document.documentElement.clientWidth - tip.offsetWidth - 8);
  const above = at.top - tip.offsetHeight - 8;
  tip.style.setProperty("left", `${left}px`);
  tip.style.setProperty("top", `${above > 4 ? above : at.bottom + 8}px`);
}

function hideTip() {
  byId("tooltip").hidden = true;
}

/** Draw a chart now, when its host changes width, and when one of the state's keys changes. */
function keepDrawn(host, keys, drawChart) {
  let width = 0;
  const redraw = () => {
    if (width < 50) return;
    const focused = [...host.querySelectorAll(".point")].indexOf(document.activeElement);
    hideTip();
    drawChart(width);
    if (focused >= 0) host.querySelectorAll(".point")[focused]?.focus();
  };
  new ResizeObserver(([entry]) => {
    if (Math.abs(entry.contentRect.width - width) < 1) return;
    width = entry.contentRect.width;
    redraw();
  }).observe(host);
  subscribe(keys, redraw);
  return redraw;
}

function legendEntry({ name, colour, shape, lined = false }, toggle) {
  const half = lined ? 13 : 6;
  const sample = svg("svg", { width: 2 * half, height: 12, viewBox: `${-half} -6 ${2 * half} 12`, "aria-hidden": "true" },
    ...(lined ? [svg("line", { class: `line c${colour}`, x1: -13, x2: 13, "stroke-dasharray": shape === null ? "3 4" : DASHES[shape % DASHES.length] })] : []),
    ...(shape === null ? [] : [marker({ x: 0, y: 0, colour, shape })]));
  return toggle
    ? el("button", { type: "button", "aria-pressed": "true", onclick: toggle }, sample, name)
    : el("span", {}, sample, name);
}
