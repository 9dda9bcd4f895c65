// Draw charts with uPlot over one axis, chosen by the reader. A report embeds its curves as JSON and draws them once;
// the dashboard calls `show` as they grow.
"use strict";
function makePlots(place) {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const AXES = { step: "step", hours: "hours since the start, breaks included", tokens: "tokens seen" };
  const PARTS = { 1: "all", 0.5: "its last half", 0.1: "its last tenth" };
  let charts = []; // {title, from_zero, lines: [{label, dots, step, hours, value, tokens_per_step}]}
  let drawn = [];
  let zoomed = false; // by the reader: growing curves then leave the view alone

  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const color = (i, n) =>
    n < 3
      ? (dark.matches ? ["#7fb0e0", "#ff9b7a"] : ["#4a7fb5", "#b3341f"])[i]
      : `hsl(${Math.round((i * 360) / n + 210) % 360} 65% ${dark.matches ? 68 : 42}%)`;

  function shown(value) {
    if (value == null) return "–";
    const size = Math.abs(value);
    if (size !== 0 && size < 0.01) return value.toExponential(2).replace(/\.?0+e/, "e");
    return value.toLocaleString("en", { maximumFractionDigits: size < 100 ? 4 : 0 });
  }

  function along(line, axis) {
    return axis === "tokens" ? line.step.map((step) => step * line.tokens_per_step) : line[axis];
  }

  function short(value) {
    for (const [unit, name] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
      if (Math.abs(value) >= unit) return +(value / unit).toPrecision(4) + name;
    return shown(value);
  }

  function nearest(plot, series, at) {
    const values = plot.data[series];
    for (let away = 0; away < values.length; away++)
      for (const i of [at - away, at + away]) if (values[i] != null) return i;
    return at;
  }

  function data(chart) {
    return uPlot.join(chart.lines.map((line) => [along(line, axis.value), line.value]));
  }

  function draw(chart, at, node) {
    const lines = chart.lines;
    const few = (i) => charts[at].lines[i].value.length < 100;
    const ruled = { stroke: style("--faint"), grid: { stroke: style("--rule"), width: 1 }, ticks: { stroke: style("--rule") } };
    const options = {
      width: node.clientWidth,
      height: Math.max(200, Math.min(300, node.clientWidth * 0.5)),
      scales: { x: { time: false }, y: chart.from_zero ? { range: (plot, low, high) => [0, high * 1.1 || 1] } : {} },
      axes: [
        { ...ruled, values: (plot, ticks) => ticks.map(short) },
        { ...ruled, size: 64, values: (plot, ticks) => ticks.map(shown) },
      ],
      cursor: { sync: { key: "run" }, y: false, dataIdx: nearest },
      hooks: { setSelect: [() => (zoomed = true)] },
      series: [
        { label: AXES[axis.value].split(" ")[0], value: (plot, value) => shown(value) },
        ...lines.map((line, i) => ({
          label: line.label,
          stroke: color(i, lines.length),
          width: line.dots ? 2 : 1.2,
          spanGaps: true,
          points: { show: line.dots && (() => few(i)), size: 5 },
          value: (plot, value) => shown(value),
        })),
      ],
    };
    return new uPlot(options, data(chart), node);
  }

  function choice(text, options, change) {
    const select = document.createElement("select");
    for (const [value, name] of options) select.add(new Option(name, value));
    select.addEventListener("change", change);
    const label = document.createElement("label");
    label.append(text + " ", select);
    choices.append(label);
    return select;
  }

  const choices = document.createElement("div");
  choices.className = "choices";
  place.append(choices);
  const axis = choice("over", Object.entries(AXES), redraw);
  const part = choice("show", Object.entries(PARTS).sort((a, b) => b[0] - a[0]), zoom);
  const overTokens = axis.querySelector("[value=tokens]");
  let nodes = [];

  function show(wanted) {
    const names = (charts) => JSON.stringify(charts.map((chart) => [chart.title, chart.lines.map((line) => line.label)]));
    const same = drawn.length && names(wanted) === names(charts);
    charts = wanted;
    if (same) {
      drawn.forEach((plot, i) => plot.setData(data(charts[i]), false));
      if (zoomed) drawn.forEach((plot) => plot.setScale("x", { min: plot.scales.x.min, max: plot.scales.x.max }));
      else zoom();
      return;
    }
    nodes.forEach((node) => node.remove());
    nodes = charts.map((chart) => {
      const node = document.createElement("div");
      const title = document.createElement("h3");
      node.className = "chart";
      title.textContent = chart.title;
      node.append(title);
      node.addEventListener("dblclick", () => setTimeout(zoom)); // after uPlot's own handler, which zooms out
      place.append(node);
      return node;
    });
    overTokens.hidden = overTokens.disabled = !charts.every((chart) => chart.lines.every((line) => line.tokens_per_step));
    if (axis.value === "tokens" && overTokens.disabled) axis.value = "step";
    redraw();
  }

  function redraw() {
    drawn.forEach((plot) => plot.destroy());
    drawn = charts.map((chart, i) => draw(chart, i, nodes[i]));
    zoom();
  }

  function zoom() {
    zoomed = false;
    const ends = charts.flatMap((chart) => chart.lines.map((line) => along(line, axis.value)));
    const last = Math.max(...ends.map((values) => values[values.length - 1]));
    const first = Math.min(...ends.map((values) => values[0]));
    if (first === last) return;
    for (const plot of drawn) plot.setScale("x", { min: last - (last - first) * part.value, max: last });
  }

  dark.addEventListener("change", redraw);
  let width = place.clientWidth;
  new ResizeObserver(() => {
    if (place.clientWidth !== width) {
      width = place.clientWidth;
      redraw();
    }
  }).observe(place);
  return { show };
}

(function () {
  const curves = document.getElementById("curves");
  if (curves) makePlots(document.getElementById("plots")).show(JSON.parse(curves.textContent));
})();
