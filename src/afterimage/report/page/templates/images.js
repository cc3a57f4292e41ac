// Images are decoded when they are first shown. Each image's data is in a script element of its own, so that
// opening the page parses none of it.
const BLOCKS_KEPT = 4;
const BITMAPS_KEPT = 240;
const blocks = new Map();
const bitmaps = new Map();

const loaded = new Promise((resolve) => {
  if (document.readyState !== "loading") resolve();
  else document.addEventListener("DOMContentLoaded", resolve, { once: true });
});

function remember(cache, key, value, most) {
  cache.delete(key);
  cache.set(key, value);
  if (cache.size > most) cache.delete(cache.keys().next().value);
  return value;
}

async function blockOf(image) {
  if (blocks.has(image)) return remember(blocks, image, blocks.get(image), BLOCKS_KEPT);
  let script = byId(`image-${image}`);
  // While the page loads, only an element that already has a successor is known to be complete.
  if (image > 0 && !byId(`image-${image + 1}`)) {
    await loaded;
    script = byId(`image-${image}`);
  }
  return remember(blocks, image, JSON.parse(script.textContent), BLOCKS_KEPT);
}

function blobOf(uri) {
  const comma = uri.indexOf(",");
  const text = atob(uri.slice(comma + 1));
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) bytes[i] = text.charCodeAt(i);
  return new Blob([bytes], { type: uri.slice(5, uri.indexOf(";")) });
}

async function decode(image, run) {
  const block = await blockOf(image);
  const uri = run === ORIGINAL ? block.original : block.runs[run];
  return uri ? createImageBitmap(blobOf(uri)) : null;
}

/** Return the image's original, or its reconstruction by a run; null where the run saved none. */
function bitmapOf(image, run) {
  const key = `${image}/${run}`;
  return remember(bitmaps, key, bitmaps.get(key) ?? decode(image, run), BITMAPS_KEPT);
}

/** Return the weight maps of a fused run on an image, one for each source, with weights as grey values; else none. */
async function mapsOf(image, run) {
  const block = await blockOf(image);
  return Promise.all((block.maps?.[run] ?? []).map((uri) => createImageBitmap(blobOf(uri))));
}

function draw(canvas, bitmap) {
  if (canvas.width !== bitmap.width) canvas.width = bitmap.width;
  if (canvas.height !== bitmap.height) canvas.height = bitmap.height;
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
}

function pixels(bitmap, width, height) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0, width, height);
  return context.getImageData(0, 0, width, height);
}

// Perceptually uniform colours from black over violet and orange to pale yellow (after matplotlib's inferno).
const HEAT = [[0, 0, 4], [40, 11, 84], [101, 21, 110], [159, 42, 99], [212, 72, 66], [245, 125, 21], [250, 193, 39], [252, 255, 164]];

function heat(value) {
  const place = clamp(value, 0, 1) * (HEAT.length - 1);
  const low = Math.min(HEAT.length - 2, Math.floor(place));
  return HEAT[low].map((c, channel) => c + (HEAT[low + 1][channel] - c) * (place - low));
}

const HEAT_TABLE = Array.from({ length: 256 }, (_, i) => heat(i / 255));

/** Draw the absolute difference of two bitmaps, averaged over the colour channels and amplified. */
function drawError(canvas, original, reconstruction, gain) {
  const { width, height } = original;
  const target = pixels(original, width, height).data;
  const image = pixels(reconstruction, width, height);
  const data = image.data;
  for (let i = 0; i < data.length; i += 4) {
    const sum = Math.abs(data[i] - target[i]) + Math.abs(data[i + 1] - target[i + 1]) + Math.abs(data[i + 2] - target[i + 2]);
    const colour = HEAT_TABLE[Math.min(255, Math.round((sum / 3) * gain))];
    data[i] = colour[0];
    data[i + 1] = colour[1];
    data[i + 2] = colour[2];
    data[i + 3] = 255;
  }
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").putImageData(image, 0, 0);
}
