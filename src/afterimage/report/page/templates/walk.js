// Choice of runs A and B: an encoder, a decoder, and a slider from the shallowest layer to the deepest for each.
const choosers = {};

function setOptions(select, names, chosen, titles = {}) {
  select.replaceChildren(...names.map((name) => el("option", { value: name }, titles[name] ?? name)));
  select.value = chosen;
  select.disabled = names.length < 2;
}

function makeChooser(slot) {
  const letter = slot.toUpperCase();
  const encoder = el("select", { "aria-label": `Encoder of ${letter}`, id: `encoder-${slot}` });
  const decoder = el("select", { "aria-label": `Decoder of ${letter}`, id: `decoder-${slot}` });
  const slider = el("input", { type: "range", min: 0, step: 1, "aria-label": `Layer of ${letter}, from shallow to deep`, id: `layer-${slot}` });
  const track = el("div", { class: "track", "aria-hidden": "true" });
  const root = el(
    "div", { class: "chooser", id: `chooser-${slot}`, role: "group", "aria-label": `Run ${letter}` },
    el("div", { class: "which" }, el("span", { class: `chip ${slot}`, "aria-hidden": "true" }, letter), encoder, decoder),
    el("div", { class: "depth" }, track, slider),
  );

  encoder.addEventListener("change", () => {
    const walks = SERIES.get(encoder.value);
    const walk = walks.get(RUNS[state[slot]].decoder) ?? walks.values().next().value;
    const place = walkOf(state[slot]).indexOf(state[slot]);
    choose(slot, walk[Math.min(place, walk.length - 1)]);
  });
  decoder.addEventListener("change", () => {
    const walk = SERIES.get(RUNS[state[slot]].series).get(decoder.value);
    const same = walk.find((run) => RUNS[run].layer === RUNS[state[slot]].layer);
    choose(slot, same ?? walk[Math.min(walkOf(state[slot]).indexOf(state[slot]), walk.length - 1)]);
  });
  slider.addEventListener("input", () => choose(slot, walkOf(state[slot])[slider.valueAsNumber]));
  return { root, encoder, decoder, slider, track, cells: [], turn: 0 };
}

/** Shorten names by their common beginning if there are many: blocks.0 to blocks.11 become 0 to 11. */
function brief(names) {
  if (names.length <= 6) return names;
  let prefix = names[0];
  for (const name of names) while (!name.startsWith(prefix)) prefix = prefix.slice(0, -1);
  prefix = prefix.replace(/\d+$/, "");
  return names.map((name) => name.slice(prefix.length) || name);
}

function renderChooser(slot) {
  const chooser = choosers[slot];
  const index = state[slot];
  const run = RUNS[index];
  const walk = walkOf(index);
  setOptions(chooser.encoder, [...SERIES.keys()], run.series);
  setOptions(chooser.decoder, [...SERIES.get(run.series).keys()], run.decoder, { "": "no decoder" });
  chooser.slider.max = walk.length - 1;
  chooser.slider.disabled = walk.length < 2;
  chooser.slider.value = walk.indexOf(index);
  chooser.slider.setAttribute("aria-valuetext", `${run.layer}, ${walk.indexOf(index) + 1} of ${walk.length}`);
  chooser.root.querySelector(".depth").style.setProperty("--count", walk.length);
  chooser.track.classList.toggle("dense", walk.length > 6);
  if (chooser.cells.length !== walk.length) {
    chooser.cells = walk.map((_, place) => makeCell(slot, place));
    chooser.track.replaceChildren(...chooser.cells.map((cell) => cell.root));
  }
  const names = brief(walk.map((run) => RUNS[run].short));
  chooser.cells.forEach((cell, place) => {
    const here = walk[place];
    cell.root.classList.toggle("current", here === index);
    cell.layer.textContent = names[place];
    cell.layer.title = RUNS[here].layer;
    cell.score.textContent = format(scoreOf(here, state.image, "psnr"), "psnr", 1).replace("unavailable", "–");
  });
  renderCells(chooser, walk);
}

function makeCell(slot, place) {
  const canvas = el("canvas", { width: 1, height: 1 });
  const layer = el("span", { class: "layer-name" });
  const score = el("span", { class: "layer-score" });
  const root = el("div", { class: "cell", onclick: () => choose(slot, walkOf(state[slot])[place]) }, canvas, layer, score);
  return { root, canvas, layer, score };
}

async function renderCells(chooser, walk) {
  chooser.turn += 1;
  const turn = chooser.turn;
  const images = await Promise.all(walk.map((run) => bitmapOf(state.image, run).catch(() => null)));
  if (turn !== chooser.turn) return;
  chooser.cells.forEach((cell, place) => {
    cell.root.classList.toggle("missing", !images[place]);
    if (images[place]) draw(cell.canvas, images[place]);
  });
}

function setUpChoosers() {
  for (const slot of ["a", "b"]) {
    choosers[slot] = makeChooser(slot);
    byId("choosers").append(choosers[slot].root);
  }
  const render = () => {
    choosers.b.root.hidden = !showsB();
    renderChooser("a");
    if (showsB()) renderChooser("b");
  };
  subscribe(["image", "a", "b", "view", "wipeLeft"], render);
  render();
}
