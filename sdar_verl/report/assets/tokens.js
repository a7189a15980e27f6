// Tokens as coloured text: blue where the teacher likes a token better than the student does, orange where it does not.
"use strict";

const Tokens = (() => {
  let mode = UI.recall("sdar-colour") === "gate" ? "gate" : "gap";
  const GAP_RANGE = 2; // nats at which the colour is full

  // -1 .. 1; null where the distillation term does not read the token.
  function strength(gap, gate) {
    if (mode === "gate") return gate === null || gate === undefined ? null : Math.max(-1, Math.min(1, 2 * gate - 1));
    if (gap === null || gap === undefined) return null;
    // The square root keeps the sign and makes small gaps visible.
    return Math.sign(gap) * Math.min(1, Math.sqrt(Math.abs(gap) / GAP_RANGE));
  }

  function paint(node, value) {
    node.classList.toggle("none", value === null);
    node.style.backgroundColor = value === null
      ? ""
      : `rgb(var(${value >= 0 ? "--likes" : "--dislikes"}) / ${(Math.abs(value) * 0.82).toFixed(3)})`;
    node.classList.toggle("strong", value !== null && Math.abs(value) > 0.66);
  }

  const tip = UI.el("div", { id: "tip", role: "tooltip", hidden: true });
  document.body.append(tip);

  function show(node, turn, i) {
    const at = (column) => (turn[column] ? turn[column][i] : null);
    const chance = (logProb) => (logProb === null || logProb === undefined ? "–" : `${(100 * Math.exp(logProb)).toPrecision(3)} %`);
    const line = (name, value) => [UI.el("dt", {}, name), UI.el("dd", {}, value)];
    tip.replaceChildren(
      UI.el("code", {}, JSON.stringify(turn.tokens[i])),
      UI.el("dl", {},
        line("gap", `${UI.signed(at("gap"))} nats`),
        line("gate", UI.number(at("gate"))),
        line("student", `${UI.number(at("student"))} nats, ${chance(at("student"))}`),
        line("teacher", `${UI.number(at("teacher"))} nats, ${chance(at("teacher"))}`),
        at("entropy") === null ? [] : line("entropy", `${UI.number(at("entropy"))} nats`),
        at("advantage") === null ? [] : line("advantage", UI.signed(at("advantage"))),
        line("token id", String(turn.ids[i]))),
    );
    tip.hidden = false;
    const box = node.getBoundingClientRect();
    const left = Math.min(box.left, window.innerWidth - tip.offsetWidth - 8);
    const below = box.bottom + tip.offsetHeight + 12 < window.innerHeight;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${below ? box.bottom + 6 : Math.max(8, box.top - tip.offsetHeight - 6)}px`;
  }

  const hide = () => { tip.hidden = true; };
  document.addEventListener("scroll", hide, true);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

  function render(turn) {
    const box = UI.el("div", { class: "tokens", "data-mode": mode });
    turn.tokens.forEach((text, i) => {
      if (text === "") return;
      const [gap, gate] = [turn.gap ? turn.gap[i] : null, turn.gate ? turn.gate[i] : null];
      const node = UI.el("span", { class: "token", "data-i": i }, text.replace(/\n/g, "↵\n"));
      paint(node, strength(gap, gate));
      box.append(node);
    });
    const over = (event) => {
      const node = event.target.closest(".token");
      if (node) show(node, turn, Number(node.dataset.i));
    };
    box.addEventListener("pointerover", over);
    box.addEventListener("click", over);
    box.addEventListener("pointerleave", hide);
    return box;
  }

  function repaint(root, turns) {
    for (const box of root.querySelectorAll(".tokens")) {
      const turn = turns(box);
      for (const node of box.children) {
        const i = Number(node.dataset.i);
        paint(node, strength(turn.gap ? turn.gap[i] : null, turn.gate ? turn.gate[i] : null));
      }
      box.dataset.mode = mode;
    }
  }

  function legend() {
    const labels = mode === "gap" ? ["−2", "−0.5", "0", "+0.5", "+2 nats"] : ["0", "", "1/2", "", "1"];
    const bar = UI.el("span", { class: "scale" });
    for (let i = -10; i <= 10; i++) {
      const cell = UI.el("i");
      paint(cell, i / 10);
      bar.append(cell);
    }
    return UI.el("div", { class: "colours" },
      UI.el("span", { class: "side" }, "teacher objects"),
      UI.el("span", { class: "ruler" }, bar, UI.el("span", { class: "marks" }, labels.map((text) => UI.el("b", {}, text)))),
      UI.el("span", { class: "side" }, "teacher endorses"));
  }

  return {
    render, repaint, legend,
    get mode() { return mode; },
    toggle() { mode = mode === "gap" ? "gate" : "gap"; UI.remember("sdar-colour", mode); },
  };
})();
