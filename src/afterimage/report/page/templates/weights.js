// Fusion weights: below the scores of a fused run a small map for each source, all on one scale.
function weightStrip(slot) {
  const index = state[slot];
  const { fusion } = RUNS[index];
  if (fusion.length === 0) return [];
  const items = fusion.map(({ source, weight }) => {
    const colon = source.indexOf(":");
    const [model, layer] = [source.slice(0, colon).split(".")[0], source.slice(colon + 1)];
    const canvas = el("canvas", { role: "img", width: 1, height: 1, hidden: true });
    return el(
      "li", { title: `${source}: mean weight ${weight.toFixed(2)} over all test images` }, canvas,
      el("span", {}, model), el("span", {}, layer, " ", el("b", {}, weight.toFixed(2))),
    );
  });
  const top = el("span", {});
  const strip = el(
    "div", { class: "weights", role: "group", "aria-label": `Fusion weights of ${slot.toUpperCase()}` },
    el("div", { class: "weights-head" }, el("strong", {}, "Fusion weights"), el("span", { class: "scale" }, "0", el("span", { class: "heat", "aria-hidden": "true" }), top)),
    el("ul", {}, ...items),
  );
  drawWeights(items.map((item) => item.firstChild), top, index, state.image);
  return [strip];
}

async function drawWeights(canvases, top, index, image) {
  const bitmaps = await mapsOf(image, index).catch((error) => { console.error(error); return []; });
  const maps = bitmaps.map((bitmap) => pixels(bitmap, bitmap.width, bitmap.height));
  const most = maps.reduce((value, map) => map.data.reduce((m, v, i) => (i % 4 === 0 && v > m ? v : m), value), 1);
  top.textContent = maps.length === 0 ? "no maps of this image" : (most / 255).toFixed(2);
  maps.forEach((map, source) => {
    const { data } = map;
    const mean = data.reduce((sum, v, i) => (i % 4 === 0 ? sum + v : sum), 0) / (data.length / 4) / 255;
    for (let i = 0; i < data.length; i += 4) data.set(HEAT_TABLE[Math.round((data[i] / most) * 255)], i);
    const canvas = canvases[source];
    canvas.width = map.width;
    canvas.height = map.height;
    canvas.hidden = false;
    canvas.setAttribute("aria-label", `Weight of ${RUNS[index].fusion[source].source} on ${IMAGES[image].id}: mean ${mean.toFixed(2)}, highest ${(most / 255).toFixed(2)} of all sources`);
    canvas.getContext("2d").putImageData(map, 0, 0);
  });
}
