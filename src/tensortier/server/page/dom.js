// Small helpers to build elements. Text goes in as text only: nothing here parses HTML.

export const $ = (id) => document.getElementById(id);

/** An element: ("p", {class: "x", text: "...", onclick: f}, ...children). Attributes that are null or false are left out. */
export function el(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

const SVG = "http://www.w3.org/2000/svg";

export function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "text") node.textContent = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else node.setAttribute(key, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** A button that can be pressed or not. Unlike a disabled one it keeps the focus: who pressed it is not thrown out. */
export function enable(button, on) {
  if (on) button.removeAttribute("aria-disabled");
  else button.setAttribute("aria-disabled", "true");
}

export function enabled(button) {
  return button.getAttribute("aria-disabled") !== "true";
}

/** Terms and values of a <dl>; [term, value, class] each. */
export function setList(dl, rows) {
  dl.replaceChildren(
    ...rows.map(([term, value, kind]) =>
      el("div", { class: kind || null }, el("dt", { text: term }), el("dd", {}, ...[value].flat())),
    ),
  );
}
