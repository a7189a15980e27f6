// The episode viewer: a list with filters on the left, one episode, or two of its group, turn by turn on the right.
"use strict";

(() => {
  const { index, bodies, conversation } = window.REPORT.viewer;
  const root = document.getElementById("viewer");
  const el = UI.el;
  const unpacked = new Map();
  const state = { shown: index.map((_, i) => i), current: 0, sibling: null, turn: 0, prompts: false, context: false };

  async function body(i) {
    if (!unpacked.has(i)) {
      const bytes = Uint8Array.from(atob(bodies[i]), (c) => c.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      const value = JSON.parse(await new Response(stream).text());
      const text = (key) => (key === null || key === undefined ? null : value.texts[key]);
      for (const turn of value.turns) {
        for (const name of ["prompt", "context", "observation", "result"]) turn[name] = text(turn[name]);
      }
      unpacked.set(i, value.turns);
    }
    return unpacked.get(i);
  }

  // ------------------------------------------------------------ filters and list

  const unique = (name) => [...new Set(index.map((episode) => episode[name]))].sort((a, b) => (a > b ? 1 : -1));
  const choice = (id, label, options) =>
    el("label", {}, el("span", {}, label), el("select", { id, onchange: filter },
      el("option", { value: "" }, "all"), options.map(([value, text]) => el("option", { value }, text))));
  const filters = el("div", { class: "filters" },
    choice("f-success", "outcome", [["1", "solved"], ["0", "not solved"]]),
    choice("f-type", "task type", unique("type").map((type) => [type, type.replaceAll("_", " ")])),
    choice("f-step", "step", unique("step").map((step) => [String(step), String(step)])),
    el("label", { class: "wide" }, el("span", {}, "words"), el("input", { id: "f-words", type: "search", placeholder: "task, skill …", oninput: filter })),
    choice("f-sort", "order", [["gap", "lowest gap first"], ["-gap", "highest gap first"], ["-turns", "longest first"]]));
  filters.querySelector("#f-sort option").textContent = "as played";
  const list = el("ol", { class: "list", tabindex: "0", "aria-label": "episodes" });
  const count = el("p", { class: "count", "aria-live": "polite" });
  const detail = el("div", { class: "detail" });
  root.append(el("aside", {}, filters, count, list), detail);
  const field = (id) => root.querySelector(id).value;

  function filter() {
    const [success, type, step, words, sort] = ["#f-success", "#f-type", "#f-step", "#f-words", "#f-sort"].map(field);
    const needles = words.toLowerCase().split(/\s+/).filter(Boolean);
    state.shown = index.map((_, i) => i).filter((i) => {
      const episode = index[i];
      const text = `${episode.task} ${episode.type} ${episode.task_id} ${episode.skills.join(" ")}`.toLowerCase();
      return (!success || String(Number(episode.success)) === success) && (!type || episode.type === type)
        && (!step || String(episode.step) === step) && needles.every((needle) => text.includes(needle));
    });
    if (sort) {
      const [name, sign] = sort.startsWith("-") ? [sort.slice(1), -1] : [sort, 1];
      state.shown.sort((a, b) => sign * ((index[a][name] ?? 0) - (index[b][name] ?? 0)));
    }
    renderList();
    if (state.shown.length && !state.shown.includes(state.current)) open(state.shown[0]);
    if (!state.shown.length) detail.replaceChildren(el("p", { class: "empty" }, "No episode passes these filters."));
    else if (detail.querySelector(".empty")) open(state.shown[0]);
  }

  function renderList() {
    count.textContent = `${state.shown.length} of ${index.length} episodes`;
    list.replaceChildren(...state.shown.map((i) => {
      const episode = index[i];
      return el("li", { "data-episode": i, class: i === state.current ? "current" : "", onclick: () => open(i, true) },
        el("span", { class: `mark ${episode.success ? "yes" : "no"}`, title: episode.success ? "solved" : "not solved" }, episode.success ? "✓" : "✗"),
        el("span", { class: "what" }, episode.task || episode.task_id),
        el("span", { class: "sub" }, `step ${episode.step} · rollout ${episode.session} · ${episode.turns} turns · gap ${UI.signed(episode.gap)}`));
    }));
  }

  function markCurrent() {
    for (const item of list.children) item.classList.toggle("current", Number(item.dataset.episode) === state.current);
    const item = list.querySelector(".current");
    // Scrolls the list alone, not the page.
    if (item) list.scrollTop += Math.min(0, item.offsetTop - list.scrollTop - 4)
      + Math.max(0, item.offsetTop + item.offsetHeight - list.scrollTop - list.clientHeight + 4);
  }

  // ------------------------------------------------------------ one episode

  const siblings = (i) => index.map((_, j) => j).filter((j) => j !== i && index[j].group === index[i].group && index[j].step === index[i].step);

  function text(title, content, opened, name) {
    return el("details", { open: opened, class: name }, el("summary", {}, title), el("pre", {}, content));
  }

  // Of a conversation, who says what: the mask tells what the policy sampled, the rest behind a prompt is a tool's.
  const said = (role, name, content) => el("p", { class: name }, conversation ? el("b", { class: "role" }, role) : null, content);

  function turnNode(turn, column) {
    const bad = turn.unparsed ? "no action in the answer" : turn.inadmissible ? "the environment does not offer this action" : null;
    return el("article", { class: "turn", id: `turn-${column}-${turn.turn}`, "data-turn": turn.turn, "data-column": column },
      el("h4", {}, `Turn ${turn.turn + 1}`, turn.endorsement === null ? null
        : el("span", { class: `endorsement ${turn.endorsement < 0 ? "minus" : "plus"}`, title: "sum of the gaps of this answer" }, `${UI.signed(turn.endorsement, 2)} nats`),
      turn.truncated ? el("span", { class: "bad" }, "teacher's prompt too long") : null),
      said(turn.turn ? "tool " : "user ", "env", turn.observation ?? ""),
      turn.context ? text("What the teacher sees and the student does not", turn.context, state.context, "context") : null,
      text("The student's prompt", turn.prompt ?? "", state.prompts, "prompt"),
      conversation ? said("assistant", "speaker", null) : null,
      Tokens.render(turn),
      conversation ? null : el("p", { class: "action" }, el("b", {}, "action "), el("code", {}, turn.action ?? "none"),
        bad ? el("span", { class: "bad" }, bad) : null,
        turn.reward ? el("span", { class: "good" }, `reward ${turn.reward}`) : null),
      turn.result ? said("tool ", "env result", turn.result) : null);
  }

  function ranking(turns, column) {
    const ranked = turns.filter((turn) => turn.endorsement !== null).sort((a, b) => b.endorsement - a.endorsement);
    if (ranked.length < 2) return null;
    const largest = Math.max(...ranked.map((turn) => Math.abs(turn.endorsement)), 1e-9);
    return el("details", { class: "ranking", open: column === 0 && !state.sibling },
      el("summary", {}, "Turns by endorsement"),
      el("div", { class: "ranks" }, ranked.map((turn) => {
        const width = `${(50 * Math.abs(turn.endorsement)) / largest}%`;
        const side = turn.endorsement < 0 ? { right: "50%", width } : { left: "50%", width };
        return el("button", { type: "button", onclick: () => go(turn.turn, column) },
          el("span", { class: "n" }, `${turn.turn + 1}`), el("span", { class: "act" }, turn.action ?? "no action"),
          el("span", { class: "bar" }, el("i", { class: turn.endorsement < 0 ? "minus" : "plus", style: side })),
          el("span", { class: "v" }, UI.signed(turn.endorsement, 2)));
      })));
  }

  async function column(i, number) {
    const episode = index[i];
    const turns = await body(i);
    return el("div", { class: "column", "data-episode": i },
      el("h3", {}, el("span", { class: `mark ${episode.success ? "yes" : "no"}` }, episode.success ? "✓ solved" : "✗ not solved"), ` ${episode.task || episode.task_id}`),
      el("p", { class: "sub" }, `step ${episode.step}, rollout ${episode.session} of its group · ${episode.type.replaceAll("_", " ")} · reward ${episode.reward} · ${episode.turns} turns, ${episode.invalid} invalid · mean gap ${UI.signed(episode.gap)}`),
      episode.skills.length ? el("p", { class: "skills" }, "skills ", episode.skills.map((name) => el("code", {}, name))) : null,
      ranking(turns, number),
      turns.map((turn) => turnNode(turn, number)));
  }

  function toolbar(i) {
    const others = siblings(i);
    const flip = (key, label, name) => el("button", { type: "button", class: state[name] ? "on" : "", "aria-pressed": String(Boolean(state[name])), title: `key ${key}`, onclick: () => unfold(name) }, label);
    return el("div", { class: "toolbar" },
      el("button", { type: "button", title: "key ←", "aria-label": "previous episode", onclick: () => step(-1) }, "←"),
      el("button", { type: "button", title: "key →", "aria-label": "next episode", onclick: () => step(1) }, "→"),
      el("button", { type: "button", id: "colour", title: "key g", onclick: recolour }, `colour: ${Tokens.mode}`),
      flip("t", "teacher's context", "context"), flip("p", "prompts", "prompts"),
      others.length ? el("label", { title: "key s" }, "beside ", el("select", { id: "sibling", onchange: (event) => beside(event.target.value) },
        el("option", { value: "" }, "nothing"),
        others.map((j) => el("option", { value: j, selected: j === state.sibling }, `rollout ${index[j].session}, ${index[j].success ? "solved" : "not solved"}, ${index[j].turns} turns`)))) : null,
      Tokens.legend());
  }

  let ticket = 0;
  async function open(i, scroll = false) {
    const mine = ++ticket;
    if (i !== state.current) { state.turn = 0; state.sibling = null; }
    state.current = i;
    markCurrent();
    try {
      const columns = [await column(i, 0)];
      if (state.sibling !== null) columns.push(await column(state.sibling, 1));
      if (mine !== ticket) return; // another one was opened meanwhile
      detail.replaceChildren(toolbar(i), el("div", { class: `columns n${columns.length}` }, columns));
      if (scroll && window.innerWidth < 900) detail.scrollIntoView({ behavior: "smooth" });
    } catch (error) {
      detail.replaceChildren(el("p", { class: "empty" }, `This episode cannot be unpacked (${error.message}); a browser of 2023 or later can.`));
    }
  }

  // ------------------------------------------------------------ what keys and buttons do

  function step(by) {
    const at = state.shown.indexOf(state.current) + by;
    if (at >= 0 && at < state.shown.length) open(state.shown[at]);
  }

  function go(turn, number = 0) {
    const node = document.getElementById(`turn-${number}-${turn}`);
    if (!node) return;
    state.turn = turn;
    for (const other of detail.querySelectorAll(".turn.current")) other.classList.remove("current");
    node.classList.add("current");
    node.scrollIntoView({ block: "nearest", behavior: "smooth" });
  }

  function unfold(name) {
    state[name] = !state[name];
    for (const node of detail.querySelectorAll(`details.${name === "prompts" ? "prompt" : "context"}`)) node.open = state[name];
    detail.querySelector(".toolbar").replaceWith(toolbar(state.current));
  }

  function recolour() {
    Tokens.toggle();
    Tokens.repaint(detail, (box) => {
      const i = Number(box.closest(".column").dataset.episode);
      const turn = Number(box.closest(".turn").dataset.turn);
      return unpacked.get(i).find((one) => one.turn === turn);
    });
    detail.querySelector(".toolbar").replaceWith(toolbar(state.current));
  }

  function beside(value) {
    state.sibling = value === "" ? null : Number(value);
    open(state.current);
  }

  const keys = {
    ArrowLeft: () => step(-1), ArrowRight: () => step(1),
    j: () => go(state.turn + (detail.querySelector(".turn.current") ? 1 : 0)), k: () => go(Math.max(0, state.turn - 1)),
    g: recolour, t: () => unfold("context"), p: () => unfold("prompts"),
    s: () => beside(state.sibling === null ? String(siblings(state.current)[0] ?? "") : ""),
    "/": () => root.querySelector("#f-words").focus(),
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const box = root.getBoundingClientRect();
    const visible = box.top < window.innerHeight && box.bottom > 0;
    if (keys[event.key] && visible && detail.querySelector(".toolbar")) {
      event.preventDefault();
      keys[event.key]();
    }
  });

  renderList();
  open(state.shown[0]);
})();
