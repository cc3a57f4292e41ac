// Shared zoom of all images by buttons, keys, double click, pinch, Ctrl and wheel; dragging pans, or moves the wipe line.
const MOST = 16;

function applyZoom() {
  const { scale, x, y } = state.zoom;
  for (const pane of panes.values()) {
    pane.stage.classList.toggle("zoomed", scale > 1);
    pane.stage.classList.toggle("pixels", scale >= 4);
    for (const layer of pane.stage.querySelectorAll(".layer")) {
      layer.style.setProperty("transform", `translate(${x * 100}%, ${y * 100}%) scale(${scale})`);
    }
  }
  byId("zoom-level").textContent = `${Number(scale.toFixed(1))}×`;
  byId("zoom-out").disabled = byId("zoom-reset").disabled = scale === 1;
  byId("zoom-in").disabled = scale === MOST;
}

/** Zoom about the fixed point (px, py), in shares of the stage. */
function zoomTo(scale, px = 0.5, py = 0.5) {
  const old = state.zoom;
  const next = clamp(scale, 1, MOST);
  const keep = (place, offset) => place - ((place - offset) / old.scale) * next;
  panTo(next, keep(px, old.x), keep(py, old.y));
}

function panTo(scale, x, y) {
  update({ zoom: { scale, x: clamp(x, 1 - scale, 0), y: clamp(y, 1 - scale, 0) } });
}

const panBy = (dx, dy) => panTo(state.zoom.scale, state.zoom.x + dx, state.zoom.y + dy);

function setUpZoom() {
  const host = byId("panes");
  const pointers = new Map();
  let drag = null;
  const place = (event, stage) => {
    const box = stage.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  };
  const spread = () => {
    const [one, other] = [...pointers.values()];
    return { gap: Math.hypot(one[0] - other[0], one[1] - other[1]), middle: [(one[0] + other[0]) / 2, (one[1] + other[1]) / 2] };
  };

  host.addEventListener("pointerdown", (event) => {
    const stage = event.target.closest(".stage");
    if (!stage || event.button !== 0) return;
    pointers.set(event.pointerId, place(event, stage));
    stage.setPointerCapture(event.pointerId);
    const wiping = event.target.closest(".handle") || (stage.querySelector(".handle") && state.zoom.scale === 1);
    drag = { stage, wiping: Boolean(wiping) && pointers.size === 1, pinch: pointers.size === 2 ? spread() : null };
    if (drag.wiping) update({ wipe: clamp(place(event, stage)[0], 0, 1) });
  });
  host.addEventListener("pointermove", (event) => {
    if (!drag || !pointers.has(event.pointerId)) return;
    const [x, y] = place(event, drag.stage);
    const [oldX, oldY] = pointers.get(event.pointerId);
    pointers.set(event.pointerId, [x, y]);
    if (drag.wiping) update({ wipe: clamp(x, 0, 1) });
    else if (drag.pinch && pointers.size === 2) {
      const now = spread();
      if (drag.pinch.gap > 0 && now.gap > 0) zoomTo((state.zoom.scale * now.gap) / drag.pinch.gap, ...now.middle);
      drag.pinch = now;
    } else if (state.zoom.scale > 1) panBy(x - oldX, y - oldY);
  });
  const release = (event) => {
    pointers.delete(event.pointerId);
    if (pointers.size === 0) drag = null;
    else if (drag) drag.pinch = null;
  };
  host.addEventListener("pointerup", release);
  host.addEventListener("pointercancel", release);
  host.addEventListener("dblclick", (event) => {
    const stage = event.target.closest(".stage");
    if (stage) zoomTo(state.zoom.scale >= 8 ? 1 : state.zoom.scale * 2, ...place(event, stage));
  });
  host.addEventListener("wheel", (event) => {
    const stage = event.target.closest(".stage");
    if (!stage || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    zoomTo(state.zoom.scale * Math.exp(-event.deltaY / 240), ...place(event, stage));
  }, { passive: false });

  byId("zoom-in").addEventListener("click", () => zoomTo(state.zoom.scale * 2));
  byId("zoom-out").addEventListener("click", () => zoomTo(state.zoom.scale / 2));
  byId("zoom-reset").addEventListener("click", () => zoomTo(1));
  subscribe(["zoom"], applyZoom);
  subscribe(["wipe"], renderWipe);
}
