// Typesets what pymdownx.arithmatex has marked, once the page is there.
document.addEventListener("DOMContentLoaded", () => {
  for (const element of document.querySelectorAll(".arithmatex")) {
    renderMathInElement(element, {
      delimiters: [
        { left: "\\(", right: "\\)", display: false },
        { left: "\\[", right: "\\]", display: true },
      ],
      // a formula that does not parse is an error in the console, which docs-check reports
      throwOnError: true,
    });
  }
});
