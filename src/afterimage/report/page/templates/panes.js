// The large images: which panes a view has, what each shows, and the words and scores below it.
const panes = new Map();
let paneTurn = 0;

const VIEWS = {
  layers: () => ["original", "a", "error-a"],
  wipe: () => ["wipe"],
  runs: () => (state.errors ? ["error-a", "original", "error-b"] : ["a", "original", "b"]),
  bound: () => ["original", "a", ...ANSWERS],
};

// Texts on the answers of the measured bound: name, content, and the message where there is none.
const KINDS = {
  estimate: ["Best estimate", "what is known", "There is no best estimate of this image."],
  refined: ["Most consistent", "what is known, and filled in", "There is no most consistent image of this one."],
};
const answerOf = (kind) => RUNS[state.a].answers[kind] ?? null;

function makePane(key) {
  const canvas = el("canvas", { role: "img", width: 1, height: 1 });
  const message = el("p", { class: "missing-note", hidden: true });
  const stage = el("div", { class: "stage", tabindex: 0, role: "group" }, el("div", { class: "layer" }, canvas), message);
  const caption = el("figcaption");
  const pane = { key, canvas, stage, message, caption, root: el("figure", { class: "pane", id: `pane-${key}` }, stage, caption) };
  if (key === "wipe") addWipe(pane);
  return pane;
}

function addWipe(pane) {
  pane.over = el("canvas", { role: "img", width: 1, height: 1 });
  pane.clip = el("div", { class: "clip" }, el("div", { class: "layer" }, pane.over));
  pane.handle = el("div", {
    class: "handle", role: "slider", tabindex: 0, "aria-label": "Wipe: share of the width that shows the left image",
    "aria-valuemin": 0, "aria-valuemax": 100, "aria-orientation": "horizontal",
  });
  pane.tags = [el("span", { class: "tag left" }), el("span", { class: "tag right" })];
  pane.stage.append(pane.clip, pane.handle, ...pane.tags);
  pane.handle.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -0.02, ArrowRight: 0.02, Home: -1, End: 1, PageDown: -0.1, PageUp: 0.1 };
    if (!(event.key in steps)) return;
    event.preventDefault();
    event.stopPropagation();
    update({ wipe: clamp(state.wipe + steps[event.key], 0, 1) });
  });
}

function renderWipe() {
  const pane = panes.get("wipe");
  if (!pane) return;
  const percent = Math.round(state.wipe * 100);
  pane.clip.style.setProperty("clip-path", `inset(0 ${100 - state.wipe * 100}% 0 0)`);
  pane.handle.style.setProperty("left", `${state.wipe * 100}%`);
  pane.handle.setAttribute("aria-valuenow", percent);
  pane.handle.setAttribute("aria-valuetext", `${percent} % ${pane.tags[0].textContent}`);
}

function scoreList(index, against = null) {
  const list = el("dl", { class: "scores" });
  for (const [metric, { name, unit }] of Object.entries(METRICS)) {
    const value = scoreOf(index, state.image, metric);
    const mean = EVERY[index].scores[metric];
    const other = against === null || !sameScale(index, against, metric) ? null : scoreOf(against, state.image, metric);
    const number = el("dd", { class: value === null ? "none" : "" }, format(value, metric), value === null ? "" : el("small", {}, unit));
    const below = value !== null && other !== null
      ? el("dd", { class: "aside" }, `${signed(value - other, metric)} to A`)
      : el("dd", { class: "aside" }, mean ? `mean ${format(mean.mean, metric)}` : "");
    list.append(el("div", {}, el("dt", {}, name), number, below));
  }
  const off = state.view === "bound" ? scoreOf(index, state.image, "distance") : null;
  if (off !== null) {
    const formula = "Between the features of this image and of the original: |f − f0|² / |f0|²";
    list.append(el("div", { title: formula }, el("dt", {}, "Feature distance"), el("dd", {}, distance(off))));
  }
  return list;
}

function answerCaption(kind) {
  const [name, detail] = KINDS[kind];
  const title = el("div", { class: "title" }, el("span", {}, el("strong", {}, name), el("small", { title: detail }, detail)));
  return answerOf(kind) === null ? [title] : [title, scoreList(answerOf(kind), state.a)];
}

function runTitle(slot) {
  const run = RUNS[state[slot]];
  const detail = run.baseline ? "baseline" : [run.series, run.decoder, run.shape].filter(Boolean).join(" · ");
  return el(
    "div", { class: "title" }, el("span", { class: `chip ${slot}` }, slot.toUpperCase()),
    el("span", {}, el("strong", {}, run.layer), " ", run.random ? el("strong", { class: "badge" }, run.random) : "", el("small", {}, detail)),
  );
}

function imageTitle() {
  const image = IMAGES[state.image];
  const step = (by, text, label) => el("button", { type: "button", class: "icon", "aria-label": label, title: label, onclick: () => stepImage(by) }, text);
  return el(
    "div", { class: "title" },
    el("span", {}, el("strong", {}, "Original"), el("small", { title: image.id }, image.id)),
    el("span", { class: "pager" }, step(-1, "‹", "Previous image"), `${state.image + 1} / ${IMAGES.length}`, step(1, "›", "Next image")),
  );
}

function errorTitle(slot) {
  const scale = el("span", { class: "heat", "aria-hidden": "true" });
  return el(
    "div", { class: "title" }, el("span", { class: `chip ${slot}` }, slot.toUpperCase()),
    el("span", {}, el("strong", {}, "Error"), el("small", {}, "absolute difference, mean of channels")),
    el("span", { class: "scale" }, "0", scale, (1 / state.gain).toFixed(2)),
  );
}

const CAPTIONS = {
  original: () => [imageTitle()],
  a: () => [runTitle("a"), scoreList(state.a), ...weightStrip("a")],
  b: () => [runTitle("b"), scoreList(state.b, state.a), ...weightStrip("b")],
  estimate: () => answerCaption("estimate"),
  refined: () => answerCaption("refined"),
  "error-a": () => (state.view === "layers" ? [errorTitle("a")] : [runTitle("a"), errorTitle("a")]),
  "error-b": () => [runTitle("b"), errorTitle("b")],
  wipe: () => [imageTitle(), runTitle("a"), scoreList(state.a), ...(showsB() ? [runTitle("b"), scoreList(state.b, state.a)] : [])],
};

function nameOf(key) {
  const image = IMAGES[state.image].id;
  if (key === "original") return `Original of ${image}`;
  const run = RUNS[state[key.endsWith("b") ? "b" : "a"]];
  if (key in KINDS) return `${KINDS[key][0]} of ${image} from ${run.name}`;
  return key.startsWith("error") ? `Error map of ${image} by ${run.name}` : `${image} reconstructed by ${run.name}`;
}

function showPane(pane, images) {
  const pair = [images[{ "error-a": "a", "error-b": "b", wipe: "a" }[pane.key] ?? pane.key]];
  if (pane.key === "wipe") pair.push(state.wipeLeft === "b" ? images.b : images.original);
  const whole = pair.every(Boolean) && (!pane.key.startsWith("error") || images.original);
  pane.message.hidden = whole;
  pane.message.textContent = whole ? "" : KINDS[pane.key]?.[2] ?? "This run saved no reconstruction of this image.";
  pane.stage.classList.toggle("empty", !whole);
  pane.stage.setAttribute("aria-label", "Image. Arrow keys: left and right change the layer, up and down the image; plus and minus zoom.");
  if (whole && pane.key.startsWith("error")) drawError(pane.canvas, images.original, pair[0], state.gain);
  else if (whole) draw(pane.canvas, pair[0]);
  pane.canvas.setAttribute("aria-label", nameOf(pane.key === "wipe" ? "a" : pane.key));
  if (pane.key === "wipe") {
    if (whole) draw(pane.over, pair[1]);
    pane.over.setAttribute("aria-label", nameOf(state.wipeLeft));
    pane.tags[0].textContent = state.wipeLeft === "b" ? `B ${RUNS[state.b].short}` : "Original";
    pane.tags[1].textContent = `A ${RUNS[state.a].short}`;
    renderWipe();
  }
}

async function renderPanes() {
  paneTurn += 1;
  const turn = paneTurn;
  const none = (error) => { console.error(error); return null; };
  const load = (run) => bitmapOf(state.image, run).catch(none);
  const [original, a, b] = await Promise.all([ORIGINAL, state.a, state.b].map(load));
  const found = await Promise.all(ANSWERS.map(answerOf).map((run) => (run === null ? null : load(run))));
  if (turn !== paneTurn) return;
  const images = { original, a, b, ...Object.fromEntries(ANSWERS.map((kind, i) => [kind, found[i]])) };
  const shown = VIEWS[state.view]();
  const host = byId("panes");
  if (host.dataset.shown !== shown.join()) {
    const held = host.contains(document.activeElement) ? document.activeElement : null;
    host.replaceChildren(...shown.map((key) => {
      if (!panes.has(key)) panes.set(key, makePane(key));
      return panes.get(key).root;
    }));
    // Keep the focus, so that keys work in the next view too.
    if (held) (host.contains(held) ? held : panes.get(shown[0]).stage).focus({ preventScroll: true });
    host.dataset.shown = shown.join();
    host.dataset.count = shown.length;
    byId("viewer").dataset.view = state.view;
    applyZoom();
  }
  for (const key of shown) {
    const pane = panes.get(key);
    showPane(pane, images);
    const focused = pane.caption.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
    pane.caption.replaceChildren(...CAPTIONS[key]());
    if (focused) pane.caption.querySelector(`[aria-label="${focused}"]`)?.focus();
  }
  host.dataset.ready = `${state.image}/${state.a}/${state.b}`;
  announce();
}

function announce() {
  const words = (index) => Object.keys(METRICS)
    .map((metric) => `${METRICS[metric].name} ${format(scoreOf(index, state.image, metric), metric)}${METRICS[metric].unit}`).join(", ");
  const parts = (showsB() ? ["a", "b"] : ["a"]).map((slot) => `${RUNS[state[slot]].name}: ${words(state[slot])}`);
  if (state.view === "bound") {
    for (const kind of ANSWERS) if (answerOf(kind) !== null) parts.push(`${KINDS[kind][0]}: ${words(answerOf(kind))}`);
  }
  byId("announce").textContent = `${IMAGES[state.image].id}. ${parts.join(". ")}.`;
}
