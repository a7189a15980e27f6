// What all pages share: the theme button, and small helpers for making elements.
"use strict";

const UI = {
  // el("p", {class: "x", onclick: f}, "text", child): text is set as text, never as HTML.
  el(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (name === "style") Object.assign(node.style, value);
      else node.setAttribute(name, value === true ? "" : value);
    }
    for (const child of children.flat()) {
      if (child !== null && child !== undefined && child !== false) node.append(child);
    }
    return node;
  },

  number(value, digits = 3) {
    return value === null || value === undefined ? "–" : value.toFixed(digits);
  },

  signed(value, digits = 3) {
    if (value === null || value === undefined) return "–";
    return (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);
  },

  remember(key, value) {
    // A page opened from disk may have no storage.
    try { localStorage.setItem(key, value); } catch { /* nothing is remembered */ }
  },

  recall(key) {
    try { return localStorage.getItem(key); } catch { return null; }
  },
};

(() => {
  const root = document.documentElement;
  const saved = UI.recall("sdar-theme");
  if (saved === "dark" || saved === "light") root.dataset.theme = saved;
  const button = document.getElementById("theme");
  if (button) {
    button.addEventListener("click", () => {
      const dark = root.dataset.theme
        ? root.dataset.theme === "dark"
        : matchMedia("(prefers-color-scheme: dark)").matches;
      root.dataset.theme = dark ? "light" : "dark";
      UI.remember("sdar-theme", root.dataset.theme);
    });
  }
})();
