// Sorting and filtering the table of results, which the document already holds, and sending its rows to the images.
function setUpTable() {
  const body = byId("table").tBodies[0];
  const rows = [...body.rows];
  const runOf = (row) => RUNS[Number(row.dataset.run)];
  const keys = {
    name: (run, index) => index,
    decoder: (run) => run.decoder || null,
    psnr: (run) => run.scores.psnr?.mean ?? null,
    ssim: (run) => run.scores.ssim?.mean ?? null,
    lpips: (run) => run.scores.lpips?.mean ?? null,
    parameters: (run) => run.parameters,
    seconds: (run) => run.seconds,
  };
  const descendingFirst = new Set(["psnr", "ssim"]);

  const sortBy = (heading, key, direction) => {
    for (const other of byId("table").querySelectorAll("th[aria-sort]")) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
    const value = (row) => keys[key](runOf(row), Number(row.dataset.run));
    // Unavailable values come last in either direction.
    body.append(...[...rows].sort((one, other) => {
      const [x, y] = [value(one), value(other)];
      if (x === null || y === null) return (x === null) - (y === null);
      return direction * (typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y);
    }));
  };
  for (const button of byId("table").querySelectorAll("[data-sort]")) {
    const heading = button.closest("th");
    const first = descendingFirst.has(button.dataset.sort) ? -1 : 1;
    button.addEventListener("click", () => {
      const now = { ascending: 1, descending: -1 }[heading.getAttribute("aria-sort")];
      sortBy(heading, button.dataset.sort, now ? -now : first);
    });
  }

  const decoders = RUNS.filter((run) => !run.baseline);
  const addOptions = (select, names) => select.append(...[...new Set(names)].map((name) => el("option", { value: name }, name)));
  addOptions(byId("filter-series"), decoders.map((run) => run.series));
  addOptions(byId("filter-decoder"), decoders.map((run) => run.decoder));

  const filter = () => {
    const words = byId("filter-text").value.toLowerCase().split(/\s+/).filter(Boolean);
    const series = byId("filter-series").value;
    const decoder = byId("filter-decoder").value;
    let count = 0;
    for (const row of rows) {
      const run = runOf(row);
      const text = row.textContent.toLowerCase();
      const fits = run.baseline
        ? byId("filter-baselines").checked
        : (!series || run.series === series) && (!decoder || run.decoder === decoder);
      row.hidden = !(fits && words.every((word) => text.includes(word)));
      count += row.hidden ? 0 : 1;
    }
    byId("filter-count").textContent = `${count} of ${rows.length} rows`;
  };
  byId("filters").addEventListener("input", filter);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  filter();

  body.addEventListener("click", (event) => {
    const button = event.target.closest("[data-slot]");
    if (!button) return;
    const run = Number(button.closest("tr").dataset.run);
    if (button.dataset.slot === "b") update({ view: "runs", b: run });
    else choose("a", run);
    byId("images").scrollIntoView();
  });
  const mark = () => {
    for (const row of rows) {
      for (const button of row.querySelectorAll("[data-slot]")) {
        button.setAttribute("aria-pressed", String(state[button.dataset.slot] === Number(row.dataset.run)));
      }
    }
  };
  subscribe(["a", "b"], mark);
  mark();
}
