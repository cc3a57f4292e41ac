// Creation of elements. Text is only set through textContent, so that a name can never become markup.
const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

const METRICS = {
  psnr: { name: "PSNR", unit: " dB", digits: 2, better: 1 },
  ssim: { name: "SSIM", unit: "", digits: 3, better: 1 },
  lpips: { name: "LPIPS", unit: "", digits: 3, better: -1 },
};

/** Write the distance of an image's features from the original's, with two digits and no power of ten. */
const distance = (value) => (value < 1e-4 ? "< 0.0001" : String(Number(value.toPrecision(2))));

const MINUS = "−";

function format(value, metric, digits = METRICS[metric].digits) {
  return typeof value === "number" ? value.toFixed(digits).replace("-", MINUS) : "unavailable";
}

function signed(value, metric) {
  const text = format(value, metric);
  return value > 0 ? `+${text}` : text;
}

function compact(value) {
  for (const [size, suffix] of [[1e9, "G"], [1e6, "M"], [1e3, "K"]]) {
    if (value >= size) return `${Number((value / size).toPrecision(3))} ${suffix}`;
  }
  return String(Number(value.toPrecision(3)));
}

function duration(seconds) {
  if (seconds < 60) return `${Number(seconds.toPrecision(3))} s`;
  if (seconds < 3600) return `${Number((seconds / 60).toPrecision(3))} min`;
  return `${Number((seconds / 3600).toPrecision(3))} h`;
}
