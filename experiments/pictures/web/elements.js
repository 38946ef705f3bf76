/* What charts and tables are made of: elements, lists to choose from, links to files, numbers in words. */
"use strict";

const ALL = "all";

/** An element with attributes, or listeners where the value is a function, and children. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** A number as it is read: five digits, and no more zeros than it needs. */
function plain(value) {
  if (value === null || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e7)) return value.toExponential(3);
  return String(Number(value.toPrecision(size >= 1e4 ? 7 : 5)));
}

/** A labelled list to choose from; `options` are [value, words]. */
function choice(label, options, value, chosen) {
  const select = make("select", { change: () => chosen(select.value) });
  for (const [each, words] of options)
    select.append(make("option", { value: each, selected: each === value }, words));
  return make("label", {}, make("span", {}, label), select);
}

/** A link whose target is made when it is followed: a blob, as browsers cut data: addresses of more than 2 MB. */
function download(words, file, type, contents) {
  const link = make("a", { download: file, href: "#" }, words);
  let address = null;
  link.addEventListener("click", () => {
    if (address) URL.revokeObjectURL(address);
    link.href = address = URL.createObjectURL(new Blob([contents()], { type: `${type};charset=utf-8` }));
  });
  return link;
}
