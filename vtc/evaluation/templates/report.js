(() => {
  const all = (query, root = document) => [...root.querySelectorAll(query)];
  const show = (model) => {
    all(".switch button").forEach((b) => b.setAttribute("aria-pressed", b.value === model));
    all(".of").forEach((part) => { part.hidden = model !== "" && part.dataset.model !== model; });
  };
  const first = document.querySelector(".switch button[value]:not([value=''])");
  all(".switch button").forEach((b) => b.addEventListener("click", () => show(b.value)));
  if (first) show(first.value);

  const pick = (keep) => all("select.keep").forEach((select) => {
    if (![...select.options].some((o) => o.value === keep)) return;
    select.value = keep;
    all(".heats > div", select.closest(".of")).forEach((map) => { map.hidden = map.dataset.keep !== keep; });
  });
  all("select.keep").forEach((select) => select.addEventListener("change", () => pick(select.value)));

  const number = (cell) => {
    const found = parseFloat(cell.textContent.trim().replace("−", "-").replace(/^[<≤]\s*/, ""));
    return Number.isNaN(found) ? null : found;
  };
  const sort = (head) => {
    const table = head.closest("table"), column = head.cellIndex, body = table.tBodies[0];
    const down = head.getAttribute("aria-sort") !== "descending";
    all("th[aria-sort]", table).forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...body.rows].map((row) => ({ row, text: row.cells[column].textContent.trim(), value: number(row.cells[column]) }));
    rows.sort((a, b) => {
      if ((a.value === null) !== (b.value === null)) return a.value === null ? 1 : -1;
      const order = a.value === null ? a.text.localeCompare(b.text) : a.value - b.value;
      return down ? -order : order;
    });
    rows.forEach(({ row }) => { row.classList.remove("starts"); body.append(row); });
  };
  all("table.main thead th").forEach((head) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => sort(head));
  });

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button.copy");
    if (!button) return;
    const code = button.parentElement.querySelector("code"), range = document.createRange();
    range.selectNodeContents(code);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    const said = (word) => { button.textContent = word; setTimeout(() => { button.textContent = "copy"; }, 1500); };
    // a page from disk may not be allowed to: the text is selected then
    (navigator.clipboard ? navigator.clipboard.writeText(code.textContent) : Promise.reject())
      .then(() => said("copied"), () => said("selected"));
  });

  let closed = [];
  addEventListener("beforeprint", () => { closed = all("details:not([open])"); closed.forEach((d) => { d.open = true; }); });
  addEventListener("afterprint", () => closed.forEach((d) => { d.open = false; }));
})();
