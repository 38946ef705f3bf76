/* The page: one chart at a time with its controls and legend, and what else is on it. */
"use strict";

const page = JSON.parse(document.getElementById("shown").textContent);
const MOST_LINES = 8;

/** What a line looks like: a colour by its place among the values that give colours, dashes by all others. */
function withLooks(chart, lines, colour, rest) {
  const places = new Map();
  const others = [...new Set(lines.map((line) => named(line, rest)))];
  return lines.map((line) => {
    const key = named(line, colour, chart.settings[0]);
    const own = page.fixed[key];
    if (!own && !places.has(key)) places.set(key, places.size);
    const place = places.get(key) ?? 0;
    const turn = Math.floor(place / page.colours.length) + others.indexOf(named(line, rest));
    return {
      ...line,
      look: {
        colour: own ?? `--c${place % page.colours.length}`,
        dash: turn % DASHES.length,
        mark: own ? 0 : place % MARKS,
      },
    };
  });
}

/** A short line in the look of a chart's, for the legend. */
function swatch(look) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const line = document.createElementNS(svg.namespaceURI, "line");
  const set = (element, values) =>
    Object.entries(values).forEach(([name, value]) => element.setAttribute(name, value));
  set(svg, { width: 30, height: 10, "aria-hidden": "true" });
  set(line, {
    x1: 0,
    x2: 30,
    y1: 5,
    y2: 5,
    stroke: "currentColor",
    "stroke-width": 2.5,
    "stroke-dasharray": DASHES[look.dash].join(" "),
  });
  svg.style.color = `var(${look.colour})`;
  svg.append(line);
  return svg;
}

/** The charts, of which one is shown, by the settings that are chosen. */
class Charts {
  constructor(place) {
    this.place = place;
    this.chosen = { chart: 0, colour: null, panels: null, only: {} };
    this.hidden = new Set();
    this.log = null;
    this.panels = [];
    this.live = make("p", { class: "unseen", "aria-live": "polite" });
    this.body = make("div");
    const kinds = page.charts.map((chart, n) =>
      make(
        "label",
        {},
        make("input", {
          type: "radio",
          name: "chart",
          value: n,
          checked: n === 0,
          change: () => this.choose({ chart: n }),
        }),
        make("span", {}, chart.title),
      ),
    );
    place.append(make("fieldset", { class: "kinds" }, make("legend", {}, "Show"), ...kinds), this.body, this.live);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
      this.panels.forEach((panel) => panel.redraw()),
    );
    this.draw();
  }

  choose(change) {
    if ("chart" in change) this.log = null;
    Object.assign(this.chosen, change);
    this.draw();
  }

  /** Which settings give colours, panels, and which values of the others are shown. */
  arrange(chart, lines) {
    const axes = varying(chart, lines);
    const known = (names) => names && names.every((name) => axes.has(name));
    const colour = known(this.chosen.colour) ? this.chosen.colour : chart.colour;
    const panels =
      this.chosen.panels === "" || axes.has(this.chosen.panels)
        ? this.chosen.panels
        : (chart.panels.find((name) => axes.has(name) && !colour.includes(name)) ?? "");
    const only = new Map();
    const held = [...axes.keys()].filter((name) => name !== panels);
    for (const name of held) {
      const wanted = this.chosen.only[name];
      if (wanted === ALL || axes.get(name).map(String).includes(wanted)) only.set(name, wanted);
      else only.set(name, name in chart.first ? String(chart.first[name]) : ALL);
    }
    const first = (name) => String(axes.get(name).includes(chart.held[name]) ? chart.held[name] : axes.get(name)[0]);
    for (const name of held.toReversed()) {
      if (name in this.chosen.only || colour.includes(name) || only.get(name) !== ALL) continue;
      if (this.most(lines, only, panels) > MOST_LINES) only.set(name, first(name));
    }
    return { axes, colour, panels, only };
  }

  passes(line, only) {
    return [...only].every(
      ([name, value]) => value === ALL || !(name in line.settings) || String(line.settings[name]) === value,
    );
  }

  most(lines, only, panels) {
    const counts = new Map();
    for (const line of lines.filter((each) => this.passes(each, only)))
      counts.set(line.settings[panels], (counts.get(line.settings[panels]) ?? 0) + 1);
    return Math.max(0, ...counts.values());
  }

  draw() {
    this.panels.forEach((panel) => panel.stop());
    const chart = page.charts[this.chosen.chart];
    const lines = linesOf(chart);
    const { axes, colour, panels, only } = this.arrange(chart, lines);
    const told = [
      ...new Set([...colour, ...[...axes.keys()].filter((name) => name !== panels && only.get(name) === ALL)]),
    ].filter((name) => name !== panels);
    const looking = withLooks(
      chart,
      lines,
      colour,
      told.filter((name) => !colour.includes(name)),
    );
    const seen = looking
      .filter((line) => this.passes(line, only))
      .map((line) => ({ ...line, name: named(line, told, chart.settings[0]) }));
    const positive = (part) => seen.every((line) => line[part].every((value) => value > 0)) && seen.length > 0;
    const can = { x: positive("x"), y: positive("y") };
    const log = { x: chart.x.log && can.x, y: (this.log ?? chart.y.log) && can.y };
    const shared = { view: {}, log, hidden: this.hidden, say: (words) => (this.live.textContent = words) };
    shared.show = (view) => {
      shared.view = view ?? this.whole(chart, seen, log);
      this.panels.forEach((panel) => panel.redraw());
    };
    shared.zoom = (factor, found) =>
      shared.show(this.nearer(shared.view, log, factor, found && [found.line.x[found.n], found.line.y[found.n]]));
    shared.view = this.whole(chart, seen, log);
    const values = panels
      ? axes.get(panels).filter((value) => seen.some((line) => line.settings[panels] === value))
      : [null];
    this.panels = values.map((value) => {
      const own = seen.filter(
        (line) => value === null || !(panels in line.settings) || line.settings[panels] === value,
      );
      return new Panel(value === null ? "" : inWords(panels, value), chart, own, shared);
    });
    const several = this.panels.length > 1;
    this.body.replaceChildren(
      this.controls(chart, axes, { colour, panels, only }, shared, can),
      make("p", { class: "about" }, `${seen.length} of ${lines.length} lines. ${chart.about}`),
      this.legend(seen, shared),
      make("div", { class: several ? "panels" : "panels one" }, ...this.panels.map((panel) => panel.element)),
    );
    this.panels.forEach((panel) => panel.start());
    this.shared = shared;
  }

  controls(chart, axes, { colour, panels, only }, shared, can) {
    const names = [...axes.keys()];
    const pairs =
      chart.colour.length > 1
        ? [chart.colour, ...names.map((name) => [name])]
        : [chart.colour, ...names.filter((name) => name !== chart.colour[0]).map((name) => [name])];
    const colours = pairs.map((pair) => [pair.join(" and "), pair]);
    const found = [
      choice(
        "Colours",
        colours.map(([words]) => [words, words]),
        colour.join(" and "),
        (words) => this.choose({ colour: new Map(colours).get(words) }),
      ),
      choice("Panels", [["", "one"], ...names.map((name) => [name, `by ${name}`])], panels, (name) =>
        this.choose({ panels: name }),
      ),
    ];
    const values = [...only].map(([name, value]) =>
      choice(name, [[ALL, "all"], ...axes.get(name).map((each) => [String(each), String(each)])], value, (each) =>
        this.choose({ only: { ...this.chosen.only, [name]: each } }),
      ),
    );
    const button = (words, label, click) =>
      make("button", { type: "button", title: label, "aria-label": label, click }, words);
    const zoom = make(
      "span",
      { class: "zoom" },
      button("+", "Zoom in", () => shared.zoom(0.5)),
      button("−", "Zoom out", () => shared.zoom(2)),
      button("whole", "Show everything", () => shared.show(null)),
      make(
        "label",
        { class: "check" },
        make("input", {
          type: "checkbox",
          checked: shared.log.y,
          disabled: !can.y,
          change: (event) => {
            this.log = event.target.checked;
            this.draw();
          },
        }),
        "logarithmic",
      ),
    );
    const open = this.open ?? innerWidth > 700;
    const settings = make(
      "details",
      { open, toggle: (event) => (this.open = event.target.open) },
      make("summary", {}, "Settings"),
      make("div", { class: "controls" }, ...found, ...values),
    );
    return make("div", { class: "tools" }, settings, zoom);
  }

  legend(seen, shared) {
    const looks = new Map(seen.map((line) => [line.name, line.look]));
    const buttons = [...looks].map(([name, look]) => {
      const button = make(
        "button",
        { type: "button", "aria-pressed": String(!this.hidden.has(name)) },
        swatch(look),
        name,
      );
      button.addEventListener("click", () => {
        if (!this.hidden.delete(name)) this.hidden.add(name);
        button.setAttribute("aria-pressed", String(!this.hidden.has(name)));
        shared.show(null);
      });
      return button;
    });
    return make(
      "div",
      { class: "legend", role: "group", "aria-label": "Lines; press one to hide or show it" },
      ...buttons,
    );
  }

  /** All that is not hidden, with the values that are always in sight. */
  whole(chart, seen, log) {
    const shown = seen.filter((line) => !this.hidden.has(line.name));
    const lines = shown.length ? shown : seen;
    const gather = (parts, more) =>
      [...lines.flatMap((line) => parts.flatMap((part) => line[part] ?? [])), ...more].filter(
        (value) => value !== null,
      );
    const y = gather(["y"], log.y ? [] : chart.y.shown);
    const few = new Set(lines.map((line) => line.name)).size <= page.most_intervals;
    const x = gather(["x"], []);
    if (!x.length) return { x: [0, 1], y: [0, 1] };
    const bars = few ? gather(["low", "high"], []).filter((value) => !log.y || value > 0) : [];
    return { x: around(x, log.x), y: around([...y, ...bars], log.y) };
  }

  /** A view some times as wide, around a point or the middle. */
  nearer(view, log, factor, point) {
    const side = (name, place) => {
      const to = log[name] ? Math.log : (value) => value;
      const back = log[name] ? Math.exp : (value) => value;
      const [low, high] = view[name].map(to);
      const middle = place === undefined ? (low + high) / 2 : to(place);
      return [back(middle - ((high - low) * factor) / 2), back(middle + ((high - low) * factor) / 2)];
    };
    return { x: side("x", point?.[0]), y: side("y", point?.[1]) };
  }
}

addEventListener("error", (event) => {
  document.querySelector("main").prepend(make("p", { role: "alert" }, `This page did not work: ${event.message}`));
});
page.colours.forEach((colour, n) => document.documentElement.style.setProperty(`--c${n}`, colour));
if (page.charts.length) new Charts(document.getElementById("charts"));
else document.getElementById("charts").remove();
document.getElementById("tables").append(...page.tables.map(drawTable));
document
  .getElementById("downloads")
  .append(
    download("results as JSON", "results.json", "application/json", () =>
      document.getElementById("results").textContent.trim(),
    ),
  );
