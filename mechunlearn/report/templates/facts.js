// Fact by fact: reads the JSON that `report/facts.py` wrote; puts text into the page as text only, never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("fact-data").textContent);
  const text = (i) => data.texts[i];
  const facts = data.facts.map((fact) => fact.map(text));
  const at = (id) => document.getElementById(id);
  const [tool, cells, search, found, list, count, view] =
    ["fact-tool", "fact-cell", "fact-search", "fact-found", "fact-list", "fact-count", "fact-view"].map(at);

  function make(tag, words = "", attributes = {}) {
    const element = document.createElement(tag);
    element.textContent = words;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  }

  function states(cell) {
    return cell.original ? [data.original, ...cell.states] : cell.states;
  }

  function heading(state) {
    return { original: "original model, asked (injected answers among the candidates)", asked: "this model, asked" }[state.name] || `after ${state.name}`;
  }

  // What a state says of a fact in its form number i; null if it was not asked so.
  function said(state, i, fact) {
    if (i < 0 || state.p[i][fact] === null) return null;
    return { p: state.p[i][fact] / 1000, correct: state.correct[i][fact], top: text(state.top[i][fact]) };
  }

  function entry(answer, attributes = {}) {
    if (!answer) return make("td", "–", attributes);
    const [mark, word, kind] =
      answer.correct === 100 ? ["✓", "right", "right"]
      : answer.correct === 0 ? ["✗", "wrong", "wrong"]
      : ["◐", `right in ${answer.correct}% of the seeds`, "partly"];
    const cell = make("td", `${mark} ${answer.p.toFixed(2)} `, { ...attributes, class: kind });
    cell.append(make("span", `${word}, `, { class: kind === "partly" ? "" : "unseen" }));
    cell.append(make("small", answer.top ? `top: ${answer.top}` : "top answer not kept"));
    return cell;
  }

  function show(fact) {
    view.replaceChildren();
    if (fact === undefined) return;
    const cell = data.cells[cells.value], all = states(cell), [subject, relation, answer] = facts[fact];
    const asked = all.filter((state) => !state.read), read = all.filter((state) => state.read);
    const table = make("table"), caption = make("caption"), head = make("tr"), body = make("tbody");
    caption.append(make("span", `${subject}, ${relation}: ${answer}`, { class: "fact-name" }), make("br"));
    caption.append(make("span", `in the cell ${cell.name}; P(true answer | candidates) and the top candidate.`));
    const link = make("a", "Link to this", { class: "fact-link", href: "#fact=" + [cell.name, ...facts[fact]].map(encodeURIComponent).join("/") });
    caption.append(link);
    head.append(make("th", "asked as", { scope: "col" }), ...asked.map((state) => make("th", heading(state), { scope: "col" })));
    for (const form of new Set(asked.flatMap((state) => state.forms))) {
      const answers = asked.map((state) => said(state, state.forms.indexOf(form), fact));
      if (answers.every((one) => one === null)) continue;
      const row = make("tr");
      row.append(make("th", text(form), { scope: "row" }), ...answers.map((one) => entry(one)));
      body.append(row);
    }
    for (const state of read) {
      const row = make("tr");
      row.append(make("th", `${state.name}, read off this model`, { scope: "row" }), entry(said(state, 0, fact), { colspan: asked.length }));
      body.append(row);
    }
    const top = make("thead");
    top.append(head);
    table.append(caption, top, body);
    view.append(table);
  }

  function recovered(cell, fact) {
    return cell.states.some((state) => state.correct.some((form) => form[fact] > 0));
  }

  function fill(chosen) {
    const wanted = search.value.trim().toLowerCase(), cell = data.cells[cells.value];
    const kept = facts.map((_, i) => i).filter(
      (i) => facts[i][0].toLowerCase().includes(wanted) && (!found.checked || recovered(cell, i)));
    list.replaceChildren(...kept.map((i) => make("option", `${facts[i][0]}, ${facts[i][1]}`, { value: i })));
    count.textContent = `${kept.length} of ${facts.length}`;
    const pick = kept.includes(chosen) ? chosen : kept[0];
    if (pick !== undefined) list.value = pick;
    show(pick);
  }

  function fromLink() {
    if (!location.hash.startsWith("#fact=")) return false;
    let parts;
    try { parts = location.hash.slice(6).split("/").map(decodeURIComponent); } catch { return false; }
    const cell = data.cells.findIndex((one) => one.name === parts[0]);
    const fact = facts.findIndex((one) => parts.slice(1).every((part, i) => one[i] === part));
    if (cell < 0 || fact < 0 || parts.length < 2) return false;
    cells.value = cell;
    search.value = "";
    found.checked = false;
    fill(fact);
    tool.closest("section").scrollIntoView();
    return true;
  }

  const current = () => (list.value === "" ? undefined : Number(list.value));
  cells.append(...data.cells.map((cell, i) => make("option", cell.name, { value: i })));
  const first = data.cells.findIndex((cell) => cell.original);
  cells.value = Math.max(first, 0);
  for (const control of [cells, search, found]) control.addEventListener("input", () => fill(current()));
  list.addEventListener("input", () => show(current()));
  window.addEventListener("hashchange", fromLink);
  tool.hidden = false;
  if (!fromLink()) fill();
})();
