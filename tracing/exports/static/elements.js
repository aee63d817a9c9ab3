// Elements, and values as people read them: shared by all that the page and the report draw. Text
// only ever becomes a text node. Imports nothing and asks nobody.

export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function threeDigits(value) {
  const size = Math.abs(value);
  const digits = size >= 99.95 ? 0 : size >= 9.995 ? 1 : 2;
  return value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

export function formatSeconds(seconds) {
  if (seconds === null || seconds === undefined) return "";
  const milliseconds = seconds * 1000;
  return Math.abs(milliseconds) < 999.5 ? `${threeDigits(milliseconds)} ms` : `${threeDigits(seconds)} s`;
}

export function formatBytes(size) {
  for (const [factor, unit] of [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]])
    if (size >= 0.9995 * factor) return `${threeDigits(size / factor)} ${unit}`;
  return `${size} B`;
}

export function formatRate(rate) {
  if (rate === null || rate === undefined) return "";
  return rate >= 0.005 ? threeDigits(rate) : "<0.01";
}

export const percent = (share) => `${Math.round(share * 100)} %`;
export const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
