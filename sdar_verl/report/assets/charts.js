// Draws window.REPORT.charts into the figures that name them (data-chart), with Observable Plot.
"use strict";

(() => {
  // Okabe and Ito's colours, which stay apart for colour-blind readers; steps of one quantity get one ramp instead.
  const LIGHT = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999", "#f0e442"];
  const DARK = ["#56b4e9", "#e69f00", "#2fbf93", "#cc79a7", "#f0e442", "#d55e00", "#999999", "#0072b2"];
  const hues = () => (isDark() ? DARK : LIGHT);
  const RAMP = ["#9ecae1", "#4292c6", "#08519c"];
  const RAMP_DARK = ["#2f6aa0", "#6baed6", "#deebf7"];

  const isDark = () => {
    const theme = document.documentElement.dataset.theme;
    return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  };

  const percent = (value) => `${Math.round(value * 1000) / 10}%`;

  function colours(chart) {
    const names = chart.names ?? (chart.series ?? []).map((one) => one.name);
    if (chart.ordered && names.length > 1) {
      const ramp = isDark() ? RAMP_DARK : RAMP;
      return new Map(names.map((name, i) => [name, ramp[Math.round((i * (ramp.length - 1)) / (names.length - 1))]]));
    }
    let next = 0;
    return new Map(names.map((name, i) => {
      const faint = chart.series?.[i]?.faint;
      return [name, faint ? (isDark() ? "#8b949e" : "#8a8f98") : hues()[next++ % hues().length]];
    }));
  }

  function legend(palette, chart) {
    if (palette.size < 2) return null;
    return UI.el("div", { class: "legend" }, [...palette].map(([name, colour]) =>
      UI.el("span", {}, UI.el("i", { style: { background: colour } }), name)));
  }

  const frame = (chart, width) => ({
    width,
    height: Math.round(Math.min(300, Math.max(210, width * 0.56))),
    marginLeft: 52,
    marginRight: 12,
    marginTop: 26,
    marginBottom: 38,
    style: { background: "none", color: "var(--ink)", fontSize: "12px", overflow: "visible" },
    x: { label: chart.x, labelAnchor: "center", labelArrow: "none", nice: false, ...integerAxis(chart) },
    y: {
      label: chart.y, labelArrow: "none", grid: true, nice: true,
      ...(chart.domain ? { domain: chart.domain } : flatDomain(chart)),
      ...(chart.percent ? { tickFormat: (v) => `${Math.round(v * 100)}%` } : {}),
      ...(chart.log ? { type: "log", tickFormat: (v) => logTick(v) } : {}),
      ...(chart.zero ? { zero: true } : {}),
    },
  });

  // A curve that never changes would stretch its rounding errors over the whole height.
  function flatDomain(chart) {
    const ys = (chart.series ?? []).flatMap((one) => one.points.flatMap((p) => p.slice(1)));
    const [low, high] = [Math.min(...ys), Math.max(...ys)];
    if (!ys.length || chart.zero || chart.log || high - low > 1e-6 * Math.max(1e-3, Math.abs(high))) return {};
    const room = Math.max(0.01, Math.abs(high) / 10);
    return { domain: [low - room, high + room] };
  }

  function logTick(value) {
    const power = Math.log10(value);
    if (Math.abs(power - Math.round(power)) > 1e-6) return "";
    return value >= 0.01 ? `${value * 100}%` : `${Number((value * 100).toPrecision(2))}%`;
  }

  function integerAxis(chart) {
    const xs = (chart.series ?? []).flatMap((one) => one.points.map((p) => p[0]));
    const rows = (chart.rows ?? []).filter((row) => "x" in row).map((row) => row.x);
    const all = xs.concat(rows);
    if (!all.length || !all.every(Number.isInteger)) return {};
    const span = Math.max(...all) - Math.min(...all);
    const ticks = span < 10 ? [...new Set(all)].sort((a, b) => a - b) : undefined;
    return { tickFormat: (v) => (Number.isInteger(v) ? `${v}` : ""), ...(ticks ? { ticks } : {}) };
  }

  const rowsOf = (series) => series.flatMap((one) =>
    one.points.map(([x, y, low, high]) => ({ x, y, low, high, name: one.name, dots: one.dots })));

  function lines(chart, width, palette) {
    let rows = rowsOf(chart.series);
    if (chart.log) rows = rows.filter((row) => row.y > 0);
    const colour = (row) => palette.get(row.name);
    const banded = rows.filter((row) => row.low !== undefined && row.low !== null);
    const wide = banded.filter((row) => !row.dots);
    const format = chart.percent || chart.log ? percent : (v) => Number(v.toPrecision(4)).toString();
    const tip = (row) => [
      row.name, `${chart.x} ${row.x}`, `${chart.y.split(",")[0]} ${format(row.y)}`,
      row.low === undefined ? "" : `95% ${format(row.low)} to ${format(row.high)}`,
    ].filter(Boolean).join("\n");
    return Plot.plot({
      ...frame(chart, width),
      marks: [
        chart.zero ? Plot.ruleY([0], { stroke: "var(--rule)" }) : null,
        Plot.areaY(wide, { x: "x", y1: "low", y2: "high", z: "name", fill: colour, fillOpacity: 0.16 }),
        // Intervals of several arms at one step stand beside each other.
        chart.series.filter((one) => one.dots).map((one, i, all) => Plot.ruleX(
          banded.filter((row) => row.name === one.name),
          { x: "x", y1: "low", y2: "high", stroke: colour, strokeOpacity: 0.5, strokeWidth: 1.5, dx: 4 * (i - (all.length - 1) / 2) })),
        Plot.lineY(rows, { x: "x", y: "y", z: "name", stroke: colour, strokeWidth: 1.8 }),
        Plot.dot(rows.filter((row) => row.dots || rows.length === 1), { x: "x", y: "y", fill: colour, r: 3 }),
        Plot.tip(rows, Plot.pointer({ x: "x", y: "y", title: tip })),
      ],
    });
  }

  function fan(chart, width, palette) {
    const bands = chart.bands.flatMap((band, i) => band.points.map(([x, low, high]) => ({ x, low, high, i })));
    const rows = rowsOf(chart.series);
    const colour = (row) => palette.get(row.name);
    return Plot.plot({
      ...frame(chart, width),
      marks: [
        Plot.areaY(bands, { x: "x", y1: "low", y2: "high", z: "i", fill: hues()[0], fillOpacity: 0.16 }),
        Plot.ruleY([chart.rule], { stroke: "var(--rule)", strokeDasharray: "3,3" }),
        Plot.lineY(rows, { x: "x", y: "y", z: "name", stroke: colour, strokeWidth: 1.8 }),
        Plot.tip(rows, Plot.pointer({ x: "x", y: "y", title: (row) => `${row.name}\n${chart.x} ${row.x}\n${Number(row.y.toPrecision(4))}` })),
      ],
    });
  }

  function bars(chart, width) {
    const longest = Math.max(...chart.rows.map((row) => row.category.length));
    return Plot.plot({
      ...frame(chart, width),
      height: 56 + 20 * chart.rows.length,
      marginLeft: Math.min(width * 0.42, 14 + longest * 6.6),
      marginRight: 40,
      x: { label: chart.x, labelAnchor: "center", labelArrow: "none", grid: true },
      y: { label: null },
      marks: [
        Plot.barX(chart.rows, { x: "value", y: "category", fill: hues()[0], sort: { y: null }, insetTop: 2, insetBottom: 2 }),
        Plot.text(chart.rows, { x: "value", y: "category", text: (row) => `${row.value}`, textAnchor: "start", dx: 4 }),
      ],
    });
  }

  function dots(chart, width) {
    const names = [...new Set(chart.rows.map((row) => row.name))];
    const palette = new Map(names.map((name, i) => [name, hues()[i % hues().length]]));
    const categories = [...new Set(chart.rows.map((row) => row.category))];
    const colour = (row) => palette.get(row.name);
    const rows = chart.rows.map((row) => ({ ...row, slot: names.indexOf(row.name) }));
    const longest = Math.max(...categories.map((text) => text.length));
    const height = 62 + categories.length * (18 + 11 * names.length);
    const node = Plot.plot({
      ...frame(chart, width),
      height,
      marginLeft: 8,
      marginRight: 16,
      marginTop: 22,
      x: { label: chart.x, labelAnchor: "center", labelArrow: "none", grid: true, domain: chart.domain, tickFormat: chart.percent ? (v) => `${Math.round(v * 100)}%` : undefined },
      y: { axis: null, domain: names.map((_, i) => i) },
      fy: { label: null, axis: null, domain: categories, padding: 0.34 },
      marks: [
        Plot.text(categories.map((category) => ({ category })), { fy: "category", text: "category", frameAnchor: "top-left", dy: -9, textAnchor: "start", fontWeight: 600 }),
        Plot.ruleY(rows.filter((row) => "low" in row), { fy: "category", y: "slot", x1: "low", x2: "high", stroke: colour, strokeOpacity: 0.55, strokeWidth: 2 }),
        Plot.dot(rows, { fy: "category", y: "slot", x: "value", fill: colour, r: 3.5 }),
        Plot.tip(rows, Plot.pointer({ fy: "category", y: "slot", x: "value", title: (row) => `${row.category}\n${row.name} ${percent(row.value)}\n${"low" in row ? `95% ${percent(row.low)} to ${percent(row.high)}` : "no interval"}` })),
      ],
    });
    return [legend(palette, chart), node];
  }

  function stack(chart, width, palette) {
    const order = new Map(chart.names.map((name, i) => [name, i]));
    const rows = [...chart.rows].sort((a, b) => a.x - b.x || order.get(a.name) - order.get(b.name));
    const colour = (row) => palette.get(row.name);
    const xs = [...new Set(rows.map((row) => row.x))];
    const tip = (row) => `${chart.x} ${row.x}\n${row.name} ${row.value.toFixed(1)} s`;
    const base = frame(chart, width);
    const ticks = xs.length <= 12 ? xs : xs.filter((x) => x % Math.ceil(xs.length / 10) === 0);
    return Plot.plot({
      ...base,
      x: { ...base.x, type: "band", padding: xs.length > 60 ? 0 : 0.15, ticks },
      marks: [
        Plot.barY(rows, Plot.stackY({ x: "x", y: "value", z: "name", order: chart.names, fill: colour })),
        Plot.tip(rows, Plot.pointer(Plot.stackY({ x: "x", y: "value", z: "name", order: chart.names, title: tip }))),
        Plot.ruleY([0], { stroke: "var(--rule)" }),
      ],
    });
  }

  const KINDS = { lines, fan, bars, dots, stack };

  function draw(figure) {
    const chart = window.REPORT.charts[Number(figure.dataset.chart)];
    const width = Math.max(260, Math.floor(figure.clientWidth - 28));
    const palette = colours(chart);
    const drawn = KINDS[chart.kind](chart, width, palette);
    const own = Array.isArray(drawn);
    figure.replaceChildren(
      UI.el("h3", {}, chart.title),
      ...(own ? drawn : [legend(palette, chart), drawn]).filter(Boolean),
      UI.el("figcaption", {}, chart.note),
    );
    figure.querySelector("svg")?.setAttribute("role", "img");
    figure.querySelector("svg")?.setAttribute("aria-label", chart.title);
  }

  const figures = [...document.querySelectorAll("[data-chart]")];
  const widths = new Map();
  const observer = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const width = Math.round(target.clientWidth);
      if (widths.get(target) !== width) {
        widths.set(target, width);
        draw(target);
      }
    }
  });
  figures.forEach((figure) => observer.observe(figure));
  const redraw = () => figures.forEach(draw);
  new MutationObserver(redraw).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
})();
