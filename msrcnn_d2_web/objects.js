// Selects the object of a row. Gradio replaces the rows when it has drawn the object; the focus stays
let focused = null;

function pick(target) {
  const row = target.closest("[data-object]");
  if (!row) return false;
  focused = row.dataset.object;
  trigger("picked", { object: Number(row.dataset.object) });
  return true;
}

element.addEventListener("click", (e) => pick(e.target));
element.addEventListener("keydown", (e) => {
  const row = e.target.closest("[data-object]");
  const step = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[e.key];
  if (row && step) {
    e.preventDefault();
    row[step]?.focus();
  } else if ((e.key === "Enter" || e.key === " ") && pick(e.target)) {
    e.preventDefault();
  }
});
watch("value", () => {
  element.querySelector(`[data-object="${focused}"]`)?.focus({ preventScroll: true });
});
