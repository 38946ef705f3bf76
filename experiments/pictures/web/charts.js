/* Charts of lines that have settings: which setting gives colours, panels or is held is chosen on the page. */
"use strict";

const DASHES = [[], [7, 4], [2, 3], [8, 3, 2, 3]];
const MARKS = 7;

/** The lines of a chart with their settings by name; those that a line does not have are left out. */
function linesOf(chart) {
  return chart.lines.map((line) => ({
    ...line,
    settings: Object.fromEntries(
      line.settings.flatMap((place, axis) =>
        place === null ? [] : [[chart.settings[axis], chart.values[axis][place]]],
      ),
    ),
  }));
}

/** Settings in which lines differ, each with its values in the order of the lines. */
function varying(chart, lines) {
  const found = new Map();
  for (const name of chart.settings) {
    const values = [...new Set(lines.filter((line) => name in line.settings).map((line) => line.settings[name]))];
    if (values.length > 1) found.set(name, values);
  }
  return found;
}

const inWords = (name, value) => (name === "method" || name === "run" ? String(value) : `${name} ${value}`);

/** The name of a line by some of its settings. */
function named(line, names, fallback) {
  const told = names.filter((name) => name in line.settings).map((name) => inWords(name, line.settings[name]));
  return told.join(", ") || String(line.settings[fallback] ?? "");
}

/** Draws a mark of one of several shapes. */
function drawMark(ctx, shape, x, y, r) {
  ctx.beginPath();
  if (shape === 0) ctx.arc(x, y, r, 0, 2 * Math.PI);
  else if (shape === 1) ctx.rect(x - r, y - r, 2 * r, 2 * r);
  else if (shape === 5 || shape === 6) {
    const [a, b] = shape === 5 ? [r * 1.3, 0] : [r, r];
    for (const [dx, dy] of [
      [a, b],
      [b, -a],
    ]) {
      ctx.moveTo(x - dx, y - dy);
      ctx.lineTo(x + dx, y + dy);
    }
    ctx.stroke();
    return;
  } else {
    const corners = [
      ,
      ,
      [
        [0, -1.3],
        [1.2, 0.9],
        [-1.2, 0.9],
      ],
      [
        [0, -1.4],
        [1.4, 0],
        [0, 1.4],
        [-1.4, 0],
      ],
      [
        [0, 1.3],
        [1.2, -0.9],
        [-1.2, -0.9],
      ],
    ];
    corners[shape].forEach(([dx, dy], n) => ctx[n ? "lineTo" : "moveTo"](x + r * dx, y + r * dy));
    ctx.closePath();
  }
  ctx.fill();
}

/** Ends of an axis around values; a little room beside them, in the logarithm where the axis has one. */
function around(values, log) {
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (log) {
    const room = low === high ? Math.log(1.5) : 0.04 * Math.log(high / low);
    return [low * Math.exp(-room), high * Math.exp(room)];
  }
  const room = low === high ? Math.abs(low) / 10 || 1 : 0.04 * (high - low);
  return [low - room, high + room];
}

/** Places of ticks on a logarithmic axis, some pixels long: at given values, or where there are few of them at 1, 2 and 5. */
function logTicks(values, low, high, pixels) {
  const inside = values.filter((value) => low <= value && value <= high);
  if (inside.length > 1) {
    const kept = [];
    for (const value of inside) {
      const room = (10 + 7 * plain(value).length) / pixels;
      if (!kept.length || Math.log(value / kept.at(-1)) > room * Math.log(high / low)) kept.push(value);
    }
    return kept;
  }
  const found = [];
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++)
    for (const step of high / low < 1000 ? [1, 2, 5] : [1]) found.push(step * 10 ** power);
  const ticks = found.filter((value) => low <= value && value <= high);
  if (ticks.length > 1) return ticks;
  return Array.from({ length: 4 }, (_, n) => Number((low * (high / low) ** ((n + 0.5) / 4)).toPrecision(3)));
}

/** One panel: its lines in a uPlot of its own, which shares the view (what is in sight) with all panels of the chart. */
class Panel {
  constructor(title, chart, lines, shared) {
    Object.assign(this, { title, chart, lines, shared });
    this.place = make("div", { class: "plot" });
    this.tip = make("div", { class: "tip", hidden: true });
    this.dot = make("div", { class: "dot", hidden: true });
    const says = `${title ? `${title}: ` : ""}${chart.title}. Arrow keys read the points, + and - zoom, 0 shows all.`;
    this.frame = make(
      "div",
      {
        class: "frame",
        tabindex: 0,
        role: "application",
        "aria-label": says,
        keydown: (event) => this.key(event),
        blur: () => this.point(null),
      },
      this.place,
    );
    this.element = make(
      "div",
      { class: "panel" },
      ...(title ? [make("h3", {}, title)] : []),
      make("div", { class: "axis" }, chart.y.label),
      this.frame,
      make("div", { class: "axis x" }, chart.x.label),
    );
  }

  /** Draws it, once it is on the page and so has a width. */
  start() {
    const { chart, shared } = this;
    const tables = this.lines.map((line) => [line.x, line.y]);
    const data = uPlot.join(tables);
    this.xs = data[0];
    const axis = (scale, log, values) => ({
      scale: scale,
      stroke: () => css("--ink"),
      grid: { stroke: () => css("--line"), width: 1 },
      ticks: { stroke: () => css("--line"), width: 1 },
      font: "12px system-ui, sans-serif",
      values: (_, splits) => splits.map(plain),
      ...(log
        ? {
            splits: (plot, __, low, high) => logTicks(values(), low, high, plot.over.clientWidth || 300),
            filter: (_, splits) => splits,
          }
        : {}),
      ...(scale === "x"
        ? {
            size: 32,
            incrs: chart.x.whole
              ? [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000]
              : undefined,
          }
        : { size: 62 }),
    });
    const scale = (name) => ({
      time: false,
      distr: shared.log[name] ? 3 : 1,
      range: () => shared.view[name],
    });
    this.plot = new uPlot(
      {
        ...this.size(),
        legend: { show: false },
        scales: { x: scale("x"), y: scale("y") },
        axes: [axis("x", shared.log.x, () => (chart.x.at_values ? this.xs : [])), axis("y", shared.log.y, () => [])],
        cursor: {
          points: { show: false },
          drag: { x: true, y: true, uni: 24, setScale: false },
          bind: { dblclick: () => () => shared.show(null) },
        },
        series: [
          {},
          ...this.lines.map((line) => ({
            show: !shared.hidden.has(line.name),
            stroke: () => css(line.look.colour),
            width: 1.6,
            dash: DASHES[line.look.dash],
            spanGaps: true,
            points: { show: false },
          })),
        ],
        hooks: {
          drawAxes: [(plot) => this.drawLevels(plot)],
          drawSeries: [(plot, place) => this.drawPoints(plot, place)],
          setCursor: [(plot) => this.hover(plot)],
          setSelect: [(plot) => this.select(plot)],
        },
      },
      data,
      this.place,
    );
    this.plot.over.append(this.dot, this.tip);
    this.watch = new ResizeObserver(() => this.plot.setSize(this.size()));
    this.watch.observe(this.frame);
  }

  stop() {
    this.watch.disconnect();
    this.plot.destroy();
  }

  size() {
    const width = Math.max(this.frame.clientWidth, 200);
    return { width, height: Math.round(Math.min(440, Math.max(230, width * 0.62))) };
  }

  get seen() {
    return this.lines.filter((line) => !this.shared.hidden.has(line.name));
  }

  /** Draws anew: what is in sight, which lines are hidden, or the theme has changed. */
  redraw() {
    this.lines.forEach((line, n) => {
      const show = !this.shared.hidden.has(line.name);
      if (this.plot.series[n + 1].show !== show) this.plot.setSeries(n + 1, { show });
    });
    const [min, max] = this.shared.view.x;
    this.plot.setScale("x", { min, max });
    this.point(null);
  }

  drawLevels(plot) {
    const { ctx, bbox } = plot;
    const [low, high] = this.shared.view.y;
    ctx.save();
    ctx.strokeStyle = css("--muted");
    ctx.lineWidth = devicePixelRatio;
    for (const value of this.chart.y.shown)
      if (low < value && value < high) {
        const y = plot.valToPos(value, "y", true);
        ctx.beginPath();
        ctx.moveTo(bbox.left, y);
        ctx.lineTo(bbox.left + bbox.width, y);
        ctx.stroke();
      }
    ctx.restore();
  }

  /** Marks and bars of a line of few points, the band of a longer one. */
  drawPoints(plot, place) {
    const line = this.lines[place - 1];
    if (!line || this.shared.hidden.has(line.name)) return;
    const { ctx, bbox } = plot;
    const few = line.x.length <= page.few_points;
    const intervals = line.low && this.seen.length <= page.most_intervals;
    const at = (value, scale) => plot.valToPos(value, scale, true);
    const known = line.x.map((_, n) => n).filter((n) => line.low && line.low[n] !== null);
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.setLineDash([]);
    ctx.strokeStyle = ctx.fillStyle = css(line.look.colour);
    ctx.lineWidth = 1.2 * devicePixelRatio;
    if (intervals && few) {
      const cap = 3 * devicePixelRatio;
      for (const n of known) {
        const [x, low, high] = [at(line.x[n], "x"), at(this.floor(line.low[n]), "y"), at(line.high[n], "y")];
        ctx.beginPath();
        ctx.moveTo(x, low);
        ctx.lineTo(x, high);
        for (const y of [low, high]) {
          ctx.moveTo(x - cap, y);
          ctx.lineTo(x + cap, y);
        }
        ctx.stroke();
      }
    } else if (intervals && known.length > 1) {
      ctx.globalAlpha = 0.14;
      ctx.beginPath();
      known.forEach((n, first) => ctx[first ? "lineTo" : "moveTo"](at(line.x[n], "x"), at(line.high[n], "y")));
      known.toReversed().forEach((n) => ctx.lineTo(at(line.x[n], "x"), at(this.floor(line.low[n]), "y")));
      ctx.closePath();
      ctx.fill();
      ctx.globalAlpha = 1;
    }
    if (few)
      line.x.forEach((x, n) => drawMark(ctx, line.look.mark, at(x, "x"), at(line.y[n], "y"), 3.4 * devicePixelRatio));
    ctx.restore();
  }

  /** A value that an axis with a logarithm can show. */
  floor(value) {
    return this.shared.log.y ? Math.max(value, this.shared.view.y[0] / 2) : value;
  }

  hover(plot) {
    const { left, top } = plot.cursor;
    if (left === undefined || left < 0) return this.keyed ? undefined : this.point(null);
    let nearest = null;
    for (const line of this.seen)
      line.x.forEach((x, n) => {
        const [dx, dy] = [plot.valToPos(x, "x") - left, plot.valToPos(line.y[n], "y") - top];
        const far = Math.hypot(dx, dy);
        if (far < 60 && (!nearest || far < nearest.far)) nearest = { line, n, far };
      });
    this.keyed = false;
    this.point(nearest);
  }

  /** Shows the numbers of a point, or none. */
  point(found) {
    this.found = found;
    this.tip.hidden = this.dot.hidden = !found;
    if (!found) return;
    const { line, n } = found;
    const { x, y } = this.chart;
    let value = plain(line.y[n]);
    if (line.low && line.low[n] !== null) value += ` (${plain(line.low[n])} to ${plain(line.high[n])})`;
    const at = `${x.label}: ${plain(line.x[n])}`;
    this.tip.replaceChildren(
      make("b", {}, line.name || this.chart.title),
      make("span", {}, `${y.label}: ${value}`),
      make("span", {}, at),
    );
    const [left, top] = [this.plot.valToPos(line.x[n], "x"), this.plot.valToPos(line.y[n], "y")];
    Object.assign(this.dot.style, { left: `${left}px`, top: `${top}px`, borderColor: css(line.look.colour) });
    const { clientWidth, clientHeight } = this.plot.over;
    this.tip.style.left = `${Math.min(Math.max(left - this.tip.offsetWidth / 2, -50), clientWidth - this.tip.offsetWidth)}px`;
    this.tip.style.top = `${top > clientHeight / 2 ? top - this.tip.offsetHeight - 12 : top + 12}px`;
    if (this.keyed) this.shared.say(`${line.name}: ${y.label} ${value}, ${at}`);
  }

  key(event) {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in steps && this.seen.length) {
      const [other, along] = steps[event.key];
      const now = Math.max(0, this.seen.indexOf(this.found?.line));
      const line = this.seen[(now + other + this.seen.length) % this.seen.length];
      const n = this.found ? Math.min(Math.max(this.found.n + along, 0), line.x.length - 1) : 0;
      this.keyed = true;
      this.point({ line, n });
    } else if (event.key === "+" || event.key === "=") this.shared.zoom(0.5, this.found);
    else if (event.key === "-") this.shared.zoom(2, this.found);
    else if (event.key === "0" || event.key === "Escape") this.shared.show(null);
    else return;
    event.preventDefault();
  }

  /** Zooms to what was dragged over. */
  select(plot) {
    const { left, top, width, height } = plot.select;
    if (width < 4 && height < 4) return;
    const x = [plot.posToVal(left, "x"), plot.posToVal(left + width, "x")];
    const y = [plot.posToVal(top + height, "y"), plot.posToVal(top, "y")];
    plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    this.shared.show({ x, y });
  }
}
