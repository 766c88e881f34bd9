// Selects the object at the place of a click
element.addEventListener("click", (e) => {
  if (e.target.tagName !== "IMG") return;
  const box = e.target.getBoundingClientRect();
  trigger("pointed", { x: (e.clientX - box.left) / box.width, y: (e.clientY - box.top) / box.height });
});
