// The data of the page and its single state. All views subscribe to changes of the state.
const DATA = JSON.parse(byId("data").textContent);
// The rows of the table, then the inversions that started from decoders; a row's `answers` are their positions.
const EVERY = DATA.runs;
const RUNS = EVERY.slice(0, DATA.rows);
const ANSWERS = ["estimate", "refined"].filter((kind) => RUNS.some((run) => kind in run.answers));
const IMAGES = DATA.images;
const ORIGINAL = null;

// Series (an encoder, or the baselines) -> decoder -> runs from shallow to deep.
const SERIES = new Map();
RUNS.forEach((run, index) => {
  if (!SERIES.has(run.series)) SERIES.set(run.series, new Map());
  const decoders = SERIES.get(run.series);
  if (!decoders.has(run.decoder)) decoders.set(run.decoder, []);
  decoders.get(run.decoder).push(index);
});

const walkOf = (index) => SERIES.get(RUNS[index].series).get(RUNS[index].decoder);

const ROW_OF_ID = new Map(DATA.ids.map((id, row) => [id, row]));
const IMAGE_OF_ID = new Map();
const AMBIGUOUS = new Set();
IMAGES.forEach((image, index) => {
  if (IMAGE_OF_ID.has(image.id)) AMBIGUOUS.add(image.id);
  IMAGE_OF_ID.set(image.id, index);
});

/** Return the run's score on one image; null where it is unavailable or the run's image of that id differs. */
function scoreOf(index, imageIndex, metric) {
  const image = IMAGES[imageIndex];
  if (AMBIGUOUS.has(image.id) && !image.runs.includes(index)) return null;
  return EVERY[index].perImage[metric][ROW_OF_ID.get(image.id)] ?? null;
}

/** Return true if two runs' scores compare: LPIPS distances of different networks do not. */
const sameScale = (one, other, metric) => metric !== "lpips" || EVERY[one].net === EVERY[other].net;

/** Return the run's score over all images; null where it does not compare with the others in a chart. */
const meanOf = (run, metric) => (metric === "lpips" && run.net !== DATA.net ? null : run.scores[metric]);

function firstChoice() {
  const bounds = RUNS.findIndex((run) => !run.random && Object.keys(run.answers).length > 0);
  const decoders = bounds >= 0 ? bounds : RUNS.findIndex((run) => !run.baseline && !run.random);
  const start = Math.max(0, decoders);
  const walks = [...SERIES.get(RUNS[start].series).values()];
  const mean = (walk) => walk.reduce((sum, run) => sum + RUNS[run].scores.psnr.mean, 0) / walk.length;
  walks.sort((one, other) => other.length - one.length || mean(other) - mean(one));
  const place = Math.floor((walks[0].length - 1) / 2);
  const a = walks[0][place];
  if (walks.length > 1) return [a, walks[1][Math.min(place, walks[1].length - 1)]];
  const foreign = RUNS.findIndex((run, index) => index !== a && !run.baseline && run.series !== RUNS[a].series);
  if (foreign >= 0) {
    const walk = walkOf(foreign);
    return [a, walk[Math.min(place, walk.length - 1)]];
  }
  return [a, RUNS.length > 1 ? (a + 1) % RUNS.length : a];
}

const narrow = matchMedia("(max-width: 700px)");
const [firstA, firstB] = firstChoice();
const state = {
  image: 0,
  a: firstA,
  b: firstB,
  view: ANSWERS.length > 0 ? "bound" : narrow.matches ? "wipe" : "layers",
  wipeLeft: "original",
  wipe: 0.5,
  errors: false,
  linked: true,
  gain: 4,
  zoom: { scale: 1, x: 0, y: 0 },
  metric: "psnr",
};

const subscribers = [];
const subscribe = (keys, react) => subscribers.push({ keys, react });

function update(changes) {
  const changed = Object.keys(changes).filter((key) => state[key] !== changes[key]);
  Object.assign(state, changes);
  for (const { keys, react } of subscribers) if (keys.some((key) => changed.includes(key))) react();
}

const showsB = () => state.view === "runs" || (state.view === "wipe" && state.wipeLeft === "b");

/** Put a run into slot "a" or "b". B follows the depth of A where the two are linked. */
function choose(slot, index) {
  const changes = { [slot]: index };
  if (slot === "a" && state.linked && showsB()) {
    const walk = walkOf(state.b);
    const layer = walk.find((run) => RUNS[run].layer === RUNS[index].layer);
    const place = walkOf(index).indexOf(index);
    changes.b = RUNS[state.b].baseline ? state.b : layer ?? walk[Math.min(place, walk.length - 1)];
  }
  update(changes);
}

function stepLayer(slot, step) {
  const walk = walkOf(state[slot]);
  choose(slot, walk[clamp(walk.indexOf(state[slot]) + step, 0, walk.length - 1)]);
}

function stepImage(step) {
  update({ image: clamp(state.image + step, 0, IMAGES.length - 1) });
}
