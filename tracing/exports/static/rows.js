// A long table: shared by the page of `weightbus ui` and the waterfall.

import { el } from "./elements.js";

const ROW_PX = 30;
const ROWS_AHEAD = 8; // drawn above and below what is in view

// A table of which only the rows in view are in the document. Every row has the same height. Arrow
// keys, Home, End, PageUp and PageDown move among them; one row at a time can be reached by Tab.
export class Rows {
  constructor({ label, role = "grid", row = "row", head, rowPx = ROW_PX, fill, key, onkey, onopen }) {
    Object.assign(this, { rowPx, fill, key, onkey, onopen, rowRole: row });
    this.items = [];
    this.active = null; // key of the row that Tab reaches
    this.drawn = new Map();
    this.body = el("div", { class: "rows-body", role: "rowgroup" });
    this.root = el("div", { class: "rows", role, "aria-label": label, onscroll: () => this.draw() });
    if (head) this.root.append(head);
    this.root.append(this.body);
    this.root.addEventListener("keydown", (event) => this.move(event));
    this.root.addEventListener("click", (event) => this.clicked(event));
    this.root.addEventListener("focusin", (event) => this.focused(event));
    new ResizeObserver(() => this.draw()).observe(this.root);
  }

  show(items) {
    this.items = items;
    this.index = new Map(items.map((item, at) => [this.key(item), at]));
    if (!this.index.has(this.active)) this.active = items.length ? this.key(items[0]) : null;
    this.body.style.height = `${items.length * this.rowPx}px`;
    this.root.setAttribute("aria-rowcount", items.length + 1);
    this.draw(true);
  }

  draw(refill = false) {
    const top = this.root.scrollTop, height = this.root.clientHeight || 600;
    const first = Math.max(0, Math.floor(top / this.rowPx) - ROWS_AHEAD);
    const last = Math.min(this.items.length, Math.ceil((top + height) / this.rowPx) + ROWS_AHEAD);
    const wanted = new Set();
    for (let at = first; at < last; at++) wanted.add(this.key(this.items[at]));
    if (this.active !== null) wanted.add(this.active); // never lose the focus
    for (const [key, node] of this.drawn)
      if (!wanted.has(key)) { node.remove(); this.drawn.delete(key); }
    const ordered = [...wanted].sort((one, other) => this.index.get(one) - this.index.get(other));
    for (const key of ordered) this.place(key, refill);
    this.order(ordered.map((key) => this.drawn.get(key)));
  }

  // In the document as on the screen, for readers of the one who do not see the other. A node that
  // is moved loses the focus: so what stands before the focused one is moved behind it.
  order(nodes) {
    let next = this.body.firstChild;
    for (const node of nodes) {
      while (node !== next && node === document.activeElement) {
        const later = next.nextSibling;
        this.body.append(next);
        next = later;
      }
      if (node === next) next = next.nextSibling;
      else this.body.insertBefore(node, next);
    }
  }

  place(key, refill) {
    const at = this.index.get(key), item = this.items[at];
    let node = this.drawn.get(key);
    const isNew = !node;
    if (isNew) {
      node = el("div", { class: "row", role: this.rowRole });
      node.style.height = `${this.rowPx}px`;
      node.dataset.key = key;
      this.drawn.set(key, node);
      this.body.append(node);
    }
    node.style.top = `${at * this.rowPx}px`;
    node.setAttribute("aria-rowindex", at + 2);
    node.tabIndex = key === this.active ? 0 : -1;
    if (isNew || refill) this.fill(node, item);
  }

  focus(at) {
    if (!this.items.length) return;
    const before = this.drawn.get(this.active);
    at = Math.max(0, Math.min(this.items.length - 1, at));
    this.active = this.key(this.items[at]);
    const top = at * this.rowPx, head = this.root.firstChild === this.body ? 0 : this.rowPx;
    if (top < this.root.scrollTop) this.root.scrollTop = top;
    else if (top + this.rowPx + head > this.root.scrollTop + this.root.clientHeight)
      this.root.scrollTop = top + this.rowPx + head - this.root.clientHeight;
    this.draw();
    if (before) before.tabIndex = -1;
    const node = this.drawn.get(this.active);
    node.tabIndex = 0;
    node.focus();
  }

  move(event) {
    if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest("a,button")) return;
    const at = this.index?.get(this.active) ?? 0;
    const page = Math.max(1, Math.floor(Math.min(this.root.clientHeight, innerHeight) / this.rowPx) - 2);
    const to = {
      ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: this.items.length - 1,
      PageDown: at + page, PageUp: at - page,
    }[event.key];
    if (to !== undefined) this.focus(to);
    else if (event.key === "Enter" || event.key === " ") this.onopen?.(this.items[at]);
    else if (!this.onkey?.(event, this.items[at], at)) return;
    event.preventDefault();
  }

  clicked(event) {
    const node = event.target.closest(".row");
    if (!node || event.target.closest("a,button")) return;
    const at = this.index.get(node.dataset.key);
    this.focus(at);
    this.onopen?.(this.items[at]);
  }

  focused(event) {
    const node = event.target.closest(".row");
    if (!node) return;
    const before = this.drawn.get(this.active);
    if (before && before !== node) before.tabIndex = -1;
    this.active = node.dataset.key;
    node.tabIndex = 0;
    this.onfocus?.(this.items[this.index.get(this.active)]);
  }
}
