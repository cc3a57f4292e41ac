// Quality by depth: encoders side by side on one axis of quality, layers from shallow to deep, a line for each decoder.
const GAP = 26;

function setUpDepth() {
  const host = byId("depth-chart");
  const hidden = new Set();
  const lineNames = [...new Set(RUNS.filter((run) => !run.baseline).map((run) => run.decoder))];
  const single = lineNames.length === 1;
  const series = [...SERIES.keys()].filter((name) => SERIES.get(name).values().next().value.some((index) => !RUNS[index].baseline));
  const keyOf = (run) => (single ? series.indexOf(run.series) : lineNames.indexOf(run.decoder));
  const groups = series.map((name) => {
    const runs = [...SERIES.get(name).values()].flat().sort((one, other) => one - other);
    const layers = [...new Set(runs.map((index) => RUNS[index].layer))];
    const { encoder, random } = RUNS[runs[0]];
    return { name, encoder, random, layers, weight: Math.max(2, layers.length), walks: [...SERIES.get(name).values()] };
  });
  const weights = groups.reduce((sum, group) => sum + group.weight, 0);
  const entries = (single ? series : lineNames).map((name, key) => ({ name, colour: key % COLOURS, shape: key, lined: true, key }));
  if (RUNS.some((run) => run.baseline)) entries.push({ name: "Baselines", colour: "ref", shape: null, lined: true, key: "baseline" });

  const redraw = keepDrawn(host, ["metric", "a"], (width) => host.replaceChildren(drawDepth(Math.max(width, leastWidth()))));
  byId("depth-legend").append(...entries.map((entry) => legendEntry(entry, (event) => {
    if (!hidden.delete(entry.key)) hidden.add(entry.key);
    event.currentTarget.setAttribute("aria-pressed", String(!hidden.has(entry.key)));
    redraw();
  })));

  function leastWidth() {
    return 196 + groups.length * GAP + weights * 44;
  }

  function visible(index) {
    const run = RUNS[index];
    return meanOf(run, state.metric) && !hidden.has(run.baseline ? "baseline" : keyOf(run));
  }

  function drawDepth(width) {
    const metric = METRICS[state.metric];
    const shown = RUNS.map((_, index) => index).filter(visible);
    const [left, right, top, bottom] = [46, width - 150, 12, 316];
    const unit = (right - left - GAP * groups.length) / weights;
    const slanted = groups.some(({ layers, weight }) => Math.max(...layers.map((layer) => layer.length)) * 6.6 > (unit * weight) / layers.length - 4);
    const chart = svg("svg", { width, height: bottom + (slanted ? 76 : 50) + (groups.some((group) => group.random) ? 16 : 0), role: "group", "aria-label": `${metric.name} by depth. Arrow keys go from point to point.` });
    if (shown.length === 0) {
      chart.append(svg("text", { class: "tick", x: width / 2, y: 160, "text-anchor": "middle" }, "Nothing to show: every series is off."));
      return chart;
    }
    const ends = shown.flatMap((index) => {
      const { low, high } = RUNS[index].scores[state.metric];
      return [low, high, ...Object.values(missedOf(index)).slice(0, 2)];
    });
    const domain = padded(ends);
    const y = linear(domain, [bottom, top]);
    yAxis(chart, niceTicks(...domain, 6), y, left, right, tickText);
    drawBaselines(chart, shown.filter((index) => RUNS[index].baseline), y, left, right);

    const points = [];
    let start = left + GAP / 2;
    for (const group of groups) {
      const span = unit * group.weight;
      const step = span / group.layers.length;
      const x = (layer) => start + (group.layers.indexOf(layer) + 0.5) * step;
      drawGroupAxis(chart, group, { start, span, step, x, bottom, slanted });
      const walks = group.walks.map((walk, number) => {
        const dodge = (number - (group.walks.length - 1) / 2) * Math.min(5, (step * 0.5) / group.walks.length);
        return [chart, walk.filter((index) => shown.includes(index)), (run) => x(run.layer) + dodge, y];
      });
      for (const walk of walks) drawMissed(...walk);
      for (const walk of walks) points.push(...drawLine(...walk));
      start += span + GAP;
    }
    addPoints(chart, points);
    return chart;
  }

  function drawGroupAxis(chart, group, { start, span, step, x, bottom, slanted }) {
    chart.append(svg("rect", { class: "band", x: start, y: 12, width: span, height: bottom - 12, rx: 4 }));
    for (const layer of group.layers) {
      const turn = slanted ? { transform: `rotate(-32 ${x(layer)} ${bottom + 16})`, "text-anchor": "end" } : { "text-anchor": "middle" };
      chart.append(svg("text", { class: "tick", x: x(layer), y: bottom + 17, ...turn }, svg("title", {}, layer), cut(layer, slanted ? 70 : step)));
    }
    const at = { x: start + span / 2, y: bottom + (slanted ? 68 : 42), "text-anchor": "middle" };
    chart.append(svg("text", { class: "group-name", ...at }, svg("title", {}, group.name), cut(group.encoder, span + GAP - 8)));
    if (group.random) chart.append(svg("text", { class: "group-name warning", ...at, y: at.y + 16 }, group.random));
  }

  /** Return the means of a run's decoder and its measured bound over the bound's images; empty without a bound. */
  function missedOf(index) {
    return (meanOf(RUNS[index], state.metric) && RUNS[index].missed[state.metric]) || {};
  }

  function drawMissed(chart, walk, x, y) {
    const { name, unit, better } = METRICS[state.metric];
    const ends = walk.map((index) => ({ run: RUNS[index], x: x(RUNS[index]), ...missedOf(index) }))
      .map((end) => ({ ...end, gain: better * (end.bound - end.decoder) }));
    const between = (one, other, key) => one[key] + ((other[key] - one[key]) * one.gain) / (one.gain - other.gain);
    const edge = (end, other) => (end.gain > 0 ? end
      : { x: between(other, end, "x"), decoder: between(other, end, "decoder"), bound: between(other, end, "bound") });
    ends.forEach((end, place) => {
      if (end.gain > 0) {
        const told = `${end.run.decoder} at ${end.run.layer} missed ${format(Math.abs(end.bound - end.decoder), state.metric)}${unit} ${name} on ${end.images} images`;
        const top = Math.min(y(end.decoder), y(end.bound));
        chart.append(svg("rect", { class: "missed", x: end.x - 4, y: top, width: 8, height: Math.abs(y(end.decoder) - y(end.bound)) }, svg("title", {}, told)));
      }
      const next = ends[place + 1];
      if (next === undefined || !(Math.max(end.gain, next.gain) > 0)) return;
      const [one, two] = [edge(end, next), edge(next, end)];
      const corners = [[one.x, one.decoder], [two.x, two.decoder], [two.x, two.bound], [one.x, one.bound]];
      chart.append(svg("path", { class: "missed", d: `M${corners.map(([at, value]) => `${at} ${y(value)}`).join("L")}Z` }));
    });
  }

  function drawLine(chart, walk, x, y) {
    const points = walk.map((index) => {
      const run = RUNS[index];
      const score = run.scores[state.metric];
      const key = keyOf(run);
      return {
        x: x(run), y: y(score.mean), colour: key % COLOURS, shape: key, current: index === state.a, lines: describe(run, score),
        choose: () => choose("a", index), low: y(score.low), high: y(score.high),
      };
    });
    if (points.length === 0) return points;
    const { colour, shape } = points[0];
    for (const p of points) {
      chart.append(svg("line", { class: `whisker c${colour}`, x1: p.x, x2: p.x, y1: p.low, y2: p.high }));
    }
    chart.append(svg("path", { class: `line c${colour}`, "stroke-dasharray": DASHES[shape % DASHES.length], d: `M${points.map((p) => `${p.x} ${p.y}`).join("L")}` }));
    return points;
  }

  function describe(run, score) {
    const { name, unit } = METRICS[state.metric];
    const interval = score.low < score.high ? `, 95 % interval ${format(score.low, state.metric)} to ${format(score.high, state.metric)}` : "";
    return [
      `${run.layer} · ${run.series}`, `${run.decoder}${run.shape ? ` · ${run.shape}` : ""}`,
      `${name} ${format(score.mean, state.metric)}${unit}${interval}`, ...(run.random ? [run.random] : []),
    ];
  }

  function drawBaselines(chart, indices, y, left, right) {
    const labels = indices.map((index) => ({ run: RUNS[index], at: y(RUNS[index].scores[state.metric].mean) }))
      .sort((one, other) => one.at - other.at);
    let floor = -Infinity;
    for (const label of labels) {
      label.text = Math.max(label.at, floor + 14);
      floor = label.text;
    }
    for (const { run, at, text } of labels) {
      const value = format(run.scores[state.metric].mean, state.metric, METRICS[state.metric].digits - 1);
      chart.append(
        svg("line", { class: "baseline-line", x1: left, x2: right, y1: at, y2: at }),
        svg("path", { class: "leader", d: `M${right} ${at}L${right + 8} ${text}` }),
        svg("text", { class: "tick", x: right + 11, y: text, dy: "0.32em" }, svg("title", {}, run.layer), `${cut(run.short, 104)} ${value}`),
      );
    }
  }
}
