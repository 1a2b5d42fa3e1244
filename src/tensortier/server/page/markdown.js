// Markdown as models write it, to elements. What a model wrote is only ever put in as text, links go to http, https
// and mailto only, and nothing is fetched: an image becomes a link to it.

import { el } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const DEEPEST = 12; // nested lists and quotes beyond this are plain text

/** A fragment for the whole text. */
export function render(text) {
  const fragment = document.createDocumentFragment();
  fragment.append(...blocks(text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n"), 0));
  return fragment;
}

function blocks(lines, depth) {
  const found = [];
  let at = 0;
  let paragraph = [];
  const flush = () => {
    if (paragraph.length) found.push(el("p", {}, ...inline(paragraph.join("\n"))));
    paragraph = [];
  };
  while (at < lines.length) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    const heading = HEADING.exec(line);
    if (!line.trim()) {
      flush();
      at += 1;
    } else if (fence) {
      flush();
      const end = closing(lines, at + 1, fence[1]);
      found.push(code(lines.slice(at + 1, end).join("\n"), fence[2].trim().split(/\s+/)[0]));
      at = end + 1;
    } else if (heading) {
      flush();
      // the page's own headings end at level 3
      found.push(el(`h${Math.min(6, heading[1].length + 3)}`, {}, ...inline(heading[2])));
      at += 1;
    } else if (RULE.test(line)) {
      flush();
      found.push(el("hr"));
      at += 1;
    } else if (QUOTE.test(line) && depth < DEEPEST) {
      flush();
      const inner = [];
      while (at < lines.length && QUOTE.test(lines[at])) inner.push(QUOTE.exec(lines[at++])[1]);
      found.push(el("blockquote", {}, ...blocks(inner, depth + 1)));
    } else if (ITEM.test(line) && depth < DEEPEST && (!paragraph.length || !/\d/.test(ITEM.exec(line)[2]) || parseInt(ITEM.exec(line)[2], 10) === 1)) {
      flush();
      const [list, next] = listFrom(lines, at, depth);
      found.push(list);
      at = next;
    } else if (line.includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") && TABLE_RULE.test(lines[at + 1])) {
      flush();
      const [table, next] = tableFrom(lines, at);
      found.push(table);
      at = next;
    } else {
      paragraph.push(line.trim());
      at += 1;
    }
  }
  flush();
  return found;
}

function closing(lines, at, fence) {
  const end = new RegExp(`^ {0,3}${fence[0]}{${fence.length},}\\s*$`);
  while (at < lines.length && !end.test(lines[at])) at += 1;
  return at;
}

function code(text, language) {
  const copy = el("button", { type: "button", class: "quiet copy-code", text: "Copy", "data-copy": text });
  const head = el("div", { class: "code-head" }, el("span", { text: language || "code" }), copy);
  return el("div", { class: "code" }, head, el("pre", { tabindex: "0" }, el("code", { text })));
}

function listFrom(lines, start, depth) {
  const first = ITEM.exec(lines[start]);
  const indent = first[1].length;
  const ordered = /\d/.test(first[2]);
  const items = [];
  let at = start;
  while (at < lines.length) {
    const item = ITEM.exec(lines[at]);
    if (!item || item[1].length > indent + 3 || item[1].length < indent || /\d/.test(item[2]) !== ordered) break;
    const inner = [item[3]];
    const inside = lines[at].length - item[3].length; // where the item's own text begins
    at += 1;
    while (at < lines.length) {
      const line = lines[at];
      const deep = line.length - line.trimStart().length;
      const next = ITEM.exec(line);
      if (!line.trim()) {
        const following = lines[at + 1] ?? "";
        if (following.length - following.trimStart().length < inside || !following.trim()) break;
        inner.push("");
      } else if (deep >= inside || (next && deep > indent + 1)) inner.push(line.slice(Math.min(deep, inside)));
      else if (next || FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || RULE.test(line)) break;
      else inner.push(line.trim());
      at += 1;
    }
    const parts = blocks(inner, depth + 1);
    // a single paragraph is no block of its own in a tight list
    items.push(el("li", {}, ...(parts[0]?.tagName === "P" ? [...parts[0].childNodes, ...parts.slice(1)] : parts)));
    while (at + 1 < lines.length && !lines[at].trim() && ITEM.test(lines[at + 1])) at += 1;
  }
  const number = parseInt(first[2], 10);
  return [el(ordered ? "ol" : "ul", ordered && number !== 1 ? { start: number } : {}, ...items), at];
}

function cells(line) {
  const parts = line.trim().replace(/^\|/, "").replace(/\|$/, "").split(/(?<!\\)\|/);
  return parts.map((part) => part.trim().replaceAll("\\|", "|"));
}

function tableFrom(lines, start) {
  const head = cells(lines[start]);
  const rows = [];
  let at = start + 2;
  while (at < lines.length && lines[at].includes("|") && lines[at].trim()) rows.push(cells(lines[at++]));
  const row = (kind, values) => el("tr", {}, ...head.map((_, i) => el(kind, {}, ...inline(values[i] ?? ""))));
  const table = el("table", {}, el("thead", {}, row("th", head)), el("tbody", {}, ...rows.map((r) => row("td", r))));
  return [el("div", { class: "scroll", tabindex: "0" }, table), at];
}

const INLINE = new RegExp(
  [
    "\\\\([\\\\`*_{}\\[\\]()#+\\-.!~|<>])", // 1: an escaped character
    "(`+)(.+?)(?<!`)\\2(?!`)", // 2, 3: code
    "(!?)\\[((?:[^\\[\\]]|\\[[^\\]]*\\])*)\\]\\(\\s*<?([^\\s()<>]*(?:\\([^\\s()]*\\)[^\\s()<>]*)*)>?(?:\\s+[\"'][^\"']*[\"'])?\\s*\\)", // 4, 5, 6: link, image
    "<((?:https?:\\/\\/|mailto:)[^\\s<>]+)>", // 7: link in angle brackets
    "(https?:\\/\\/[^\\s<>\"'`*]*[^\\s<>\"'`*.,;:!?)\\]])", // 8: bare link
    "(\\*\\*\\*|\\*\\*|\\*|~~)(?=\\S)(.+?)(?<=\\S)\\9(?!\\*)", // 9, 10: emphasis
    "(?<![A-Za-z0-9_])(__|_)(?=\\S)(.+?)(?<=\\S)\\11(?![A-Za-z0-9_])", // 11, 12: emphasis with underscores
  ].join("|"),
  "gs",
);
const LONGEST_INLINE = 8000; // characters of one paragraph that are looked at for more than text

function inline(text, depth = 0) {
  if (depth > 6 || text.length > LONGEST_INLINE) return [text];
  const found = [];
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index > at) found.push(...broken(text.slice(at, match.index)));
    at = match.index + match[0].length;
    const [all, escaped, , source, bang, label, target, angle, bare, mark, marked, low, lowered] = match;
    if (escaped !== undefined) found.push(escaped);
    else if (source !== undefined) found.push(el("code", { text: source.replace(/^ (.*) $/s, "$1") }));
    else if (target !== undefined) found.push(link(target, bang ? [label || target] : inline(label, depth + 1), all));
    else if (angle !== undefined) found.push(link(angle, [angle], all));
    else if (bare !== undefined) found.push(link(bare, [bare], all));
    else if (mark !== undefined || low !== undefined) found.push(emphasis(mark ?? low, inline(marked ?? lowered, depth + 1)));
  }
  if (at < text.length) found.push(...broken(text.slice(at)));
  return found;
}

function emphasis(mark, children) {
  if (mark === "***") return el("em", {}, el("strong", {}, ...children));
  if (mark === "~~") return el("del", {}, ...children);
  return el(mark.length === 2 ? "strong" : "em", {}, ...children);
}

function link(target, children, source) {
  if (!/^(https?:\/\/|mailto:)/i.test(target)) return source;
  return el("a", { href: target, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
}

function broken(text) {
  return text.split("\n").flatMap((line, i) => (i ? [el("br"), line] : [line]));
}
