// Set-up of the theme, the toolbar, the keys and the first drawing.
function setUpTheme() {
  const root = document.documentElement;
  const show = () => byId("theme").setAttribute("aria-pressed", String(root.dataset.theme === "dark"));
  byId("theme").addEventListener("click", () => {
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("afterimage-theme", root.dataset.theme); } catch { /* storage is off: the choice lasts for this visit */ }
    show();
  });
  show();
}

function setUpMenu() {
  const open = (yes) => {
    byId("sections").classList.toggle("open", yes);
    byId("menu").setAttribute("aria-expanded", String(yes));
  };
  byId("menu").addEventListener("click", () => open(!byId("sections").classList.contains("open")));
  byId("sections").addEventListener("click", () => open(false));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") open(false);
  });
}

function setUpToolbar() {
  const radios = [...document.querySelectorAll("input[name=view]")];
  for (const radio of radios) radio.addEventListener("change", () => update({ view: radio.value }));
  byId("wipe-left").addEventListener("change", (event) => update({ wipeLeft: event.target.value }));
  byId("errors").addEventListener("change", (event) => update({ errors: event.target.checked }));
  byId("linked").addEventListener("change", (event) => update({ linked: event.target.checked }));
  byId("gain").addEventListener("input", (event) => update({ gain: 2 ** event.target.valueAsNumber }));
  const show = () => {
    for (const radio of radios) radio.checked = radio.value === state.view;
    const words = new Set([state.view, state.view === "runs" && state.errors ? "errors" : "", state.view === "wipe" && showsB() ? "wipe-b" : ""]);
    for (const option of document.querySelectorAll("[data-views]")) {
      option.hidden = !option.dataset.views.split(" ").some((word) => words.has(word));
    }
    byId("gain-value").textContent = state.gain;
    byId("gain").setAttribute("aria-valuetext", `${state.gain} times`);
  };
  subscribe(["view", "wipeLeft", "errors", "gain"], show);
  show();
}

function setUpKeys() {
  const view = (name) => () => update({ view: name });
  const anywhere = { ArrowLeft: () => stepLayer("a", -1), ArrowRight: () => stepLayer("a", 1) };
  // Single-character keys act only inside the viewer, so that they do not disturb speech input or forms.
  const inViewer = {
    ArrowUp: () => stepImage(-1), ArrowDown: () => stepImage(1), 1: view("layers"), 2: view("wipe"), 3: view("runs"),
    ...(ANSWERS.length > 0 && { 4: view("bound") }),
    "+": () => zoomTo(state.zoom.scale * 2), "=": () => zoomTo(state.zoom.scale * 2), "-": () => zoomTo(state.zoom.scale / 2), 0: () => zoomTo(1),
  };
  const shifted = { ArrowLeft: [0.1, 0], ArrowRight: [-0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] };
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return;
    const target = event.target;
    if (target.closest("input, select, textarea, pre, .scroll, [role=slider], [role=listbox]")) return;
    const inside = target.closest("#images") !== null;
    const atTop = target === document.body && byId("viewer").getBoundingClientRect().bottom > 0;
    let act = null;
    if (inside && event.shiftKey && event.key in shifted) act = () => panBy(...shifted[event.key]);
    else if (inside || atTop) act = anywhere[event.key] ?? (inside ? inViewer[event.key] : null);
    if (!act) return;
    event.preventDefault();
    act();
  });
}

/** Give the panes the shape of the image. */
function shapePanes() {
  const { width, height } = IMAGES[state.image];
  document.documentElement.style.setProperty("--shape", width / height);
}

setUpTheme();
setUpMenu();
if (IMAGES.length > 0) {
  setUpStrip();
  setUpChoosers();
  setUpToolbar();
  setUpZoom();
  setUpKeys();
  subscribe(["image", "a", "b", "view", "wipeLeft", "errors", "gain"], renderPanes);
  renderPanes();
  subscribe(["image"], shapePanes);
  shapePanes();
}
byId("metric").addEventListener("change", (event) => update({ metric: event.target.value }));
setUpTable();
setUpDepth();
setUpScatter();
setUpCost();
document.documentElement.dataset.ready = "true";
