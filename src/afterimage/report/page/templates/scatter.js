// Two scatter charts: the score of every image by run A against run B, and every run's quality against its cost.
function setUpScatter() {
  const host = byId("scatter-chart");
  keepDrawn(host, ["metric", "a", "b", "image"], (width) => {
    const [a, b] = [RUNS[state.a], RUNS[state.b]];
    const { metric } = state;
    const { name, unit, better } = METRICS[metric];
    const pairs = DATA.ids.map((id, row) => ({ id, x: a.perImage[metric][row], y: b.perImage[metric][row] }))
      .filter((pair) => pair.x !== null && pair.y !== null);
    const problem = state.a === state.b ? "A and B are the same run: choose another B, above or in the table."
      : a.testSet !== b.testSet ? "A and B were tested on different images, which cannot be paired."
        : !sameScale(state.a, state.b, metric) ? "A and B were measured by different LPIPS networks, which do not compare."
        : pairs.length === 0 ? `${name} is unavailable for A or B.` : "";
    byId("scatter-title").textContent = `Image by image: ${name} of A against B`;
    byId("scatter-caption").replaceChildren(
      el("span", { class: "chip a" }, "A"), ` ${a.name} `, el("span", { class: "chip b" }, "B"), ` ${b.name}. `, problem || compare(pairs, metric),
    );
    if (problem) return host.replaceChildren();

    const size = Math.min(width, 460);
    const [left, right, top, bottom] = [52, width - 14, 10, size - 46];
    const chart = svg("svg", { width, height: size, role: "group", "aria-label": `${name} of every image under A and B. Arrow keys go from point to point.` });
    const domain = padded(pairs.flatMap((pair) => [pair.x, pair.y]));
    const x = linear(domain, [left, right]);
    const y = linear(domain, [bottom, top]);
    const ticks = niceTicks(...domain, 5);
    yAxis(chart, ticks, y, left, right, tickText);
    xAxis(chart, ticks, x, top, bottom, tickText);
    chart.append(
      svg("line", { class: "diagonal", x1: left, y1: bottom, x2: right, y2: top }),
      svg("text", { class: "corner", x: left + 8, y: top + 16 }, better > 0 ? "B better" : "A better"),
      svg("text", { class: "corner", x: right - 8, y: bottom - 10, "text-anchor": "end" }, better > 0 ? "A better" : "B better"),
      svg("text", { class: "axis-name", x: (left + right) / 2, y: size - 6, "text-anchor": "middle" }, `${name} under A${unit && `,${unit}`}`),
      svg("text", { class: "axis-name", "text-anchor": "middle", transform: `translate(13 ${(top + bottom) / 2}) rotate(-90)` }, `${name} under B${unit && `,${unit}`}`),
    );
    const points = pairs.sort((one, other) => one.x - other.x).map((pair) => {
      const image = IMAGE_OF_ID.get(pair.id);
      return {
        x: x(pair.x), y: y(pair.y), colour: better * (pair.y - pair.x) > 0 ? "b" : "a", shape: 0, current: image === state.image,
        image: IMAGES[image]?.thumbnail,
        lines: [pair.id, `A ${format(pair.x, metric)}${unit}`, `B ${format(pair.y, metric)}${unit}`, `B − A ${signed(pair.y - pair.x, metric)}${unit}`],
        choose: image === undefined ? null : () => update({ image }),
      };
    });
    addPoints(chart, points);
    return host.replaceChildren(chart);
  });
}

function compare(pairs, metric) {
  const { unit, better } = METRICS[metric];
  const gaps = pairs.map((pair) => pair.y - pair.x);
  const wins = gaps.filter((gap) => gap * better > 0).length;
  return `B is better on ${wins} of ${pairs.length} images; mean of B − A: ${signed(average(gaps), metric)}${unit}.`;
}

const average = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

function setUpCost() {
  const host = byId("cost-chart");
  const series = [...new Set(RUNS.filter((run) => !run.baseline).map((run) => run.series))];
  const shapes = [...new Set(RUNS.filter((run) => !run.baseline).map((run) => run.decoder))];
  const axis = byId("cost-axis");
  byId("cost-legend").append(...series.map((name, index) => legendEntry({ name, colour: index % COLOURS, shape: 0 }, null)));
  byId("cost-decoders").append(...shapes.map((name, shape) => legendEntry({ name, colour: "ref", shape }, null)));
  const units = { locations: compact, parameters: compact, seconds: duration };
  const redraw = keepDrawn(host, ["metric", "a"], (width) => {
    const { metric } = state;
    const { name, unit } = METRICS[metric];
    const text = units[axis.value];
    const shown = RUNS.map((run, index) => ({ run, index, cost: run[axis.value], score: meanOf(run, metric) }))
      .filter(({ run, cost, score }) => !run.baseline && cost > 0 && score);
    if (shown.length === 0) return host.replaceChildren(el("p", { class: "caption" }, "No run has both numbers."));
    const size = Math.min(width, 460);
    const [left, right, top, bottom] = [52, width - 14, 10, size - 46];
    const chart = svg("svg", { width, height: size, role: "group", "aria-label": `${name} against ${axis.selectedOptions[0].text}. Arrow keys go from point to point.` });
    const logs = padded(shown.map(({ cost }) => Math.log10(cost)), 0.08);
    const domain = padded(shown.map(({ score }) => score.mean));
    const scale = linear(logs, [left, right]);
    const y = linear(domain, [bottom, top]);
    yAxis(chart, niceTicks(...domain, 5), y, left, right, tickText);
    xAxis(chart, logTicks(10 ** logs[0], 10 ** logs[1]), (value) => scale(Math.log10(value)), top, bottom, text);
    chart.append(
      svg("text", { class: "axis-name", x: (left + right) / 2, y: size - 6, "text-anchor": "middle" }, axis.selectedOptions[0].text),
      svg("text", { class: "axis-name", "text-anchor": "middle", transform: `translate(13 ${(top + bottom) / 2}) rotate(-90)` }, `${name}${unit && `,${unit}`}`),
    );
    const ordered = shown.sort((one, other) => one.cost - other.cost || one.score.mean - other.score.mean);
    addPoints(chart, ordered.map(({ run, index, cost, score }) => ({
      x: scale(Math.log10(cost)), y: y(score.mean), colour: series.indexOf(run.series) % COLOURS, shape: shapes.indexOf(run.decoder),
      current: index === state.a, choose: () => choose("a", index),
      lines: [`${run.layer} · ${run.series}`, run.decoder, `${name} ${format(score.mean, metric)}${unit}`, `${text(cost)} ${axis.value === "seconds" ? "of training" : axis.value}`],
    })));
    return host.replaceChildren(chart);
  });
  axis.addEventListener("change", redraw);
}
