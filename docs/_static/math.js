// Typeset the formulas of a page with the vendored KaTeX.
document.addEventListener("DOMContentLoaded", () => {
  for (const element of document.querySelectorAll(".math")) {
    const display = element.tagName === "DIV";
    const text = element.textContent.trim().slice(2, -2);
    katex.render(text, element, { displayMode: display, throwOnError: false });
  }
});
