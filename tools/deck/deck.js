// A deck: choose the theme, set the mathematics, mark the steps, then let reveal.js begin.

const isPrinted = /print-pdf/.test(location.search);

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
}

function chosenTheme() {
  const asked = new URLSearchParams(location.search).get("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  return isPrinted ? "light" : asked || (dark ? "dark" : "light");
}

function toggleTheme() {
  setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
}

// An equation that is too wide is made smaller. The tests allow this down to 0.75.
function fitEquations() {
  for (const equation of document.querySelectorAll(".equation")) {
    const formula = equation.querySelector("svg");
    const { width, height } = formula.getBoundingClientRect();
    const number = equation.querySelector(".number");
    const room = equation.clientWidth - (number ? number.offsetWidth + 24 : 0);
    const scale = Math.min(1, room / width);
    equation.dataset.scale = scale.toFixed(3);
    // in pixels: the browser rounds the unit ex, so that a smaller font would not do
    formula.style.width = `${scale * width}px`;
    formula.style.height = `${scale * height}px`;
  }
}

// The rows of an equation appear one after the other.
function markRows() {
  for (const equation of document.querySelectorAll(".equation")) {
    let outermost = equation.querySelector('g[data-mml-node="math"]');
    while (outermost && outermost.dataset.mmlNode !== "mtable") {
      const parts = [...outermost.children].filter((child) => child.tagName === "g");
      outermost = parts.length === 1 ? parts[0] : null;
    }
    const rows = outermost ? [...outermost.querySelectorAll(":scope > g[data-mml-node='mtr']")] : [];
    rows.slice(1).forEach((row) => row.classList.add("fragment"));
  }
}

async function startDeck() {
  await MathJax.typesetPromise();
  fitEquations();
  markRows();
  document.body.classList.remove("typesetting");
  await Reveal.initialize({
    width: 1280,
    height: 720,
    margin: isPrinted ? 0.1 : 0,
    minScale: 0.1,
    maxScale: 4,
    center: false,
    hash: true,
    hashOneBasedIndex: true,
    controls: false,
    transition: "none",
    pdfSeparateFragments: false,
    pdfMaxPagesPerSlide: 1,
    keyboard: { 68: toggleTheme },
    plugins: [RevealNotes],
  });
  document.body.dataset.ready = "true";
}

setTheme(chosenTheme());
window.MathJax = {
  tex: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]] },
  svg: { fontCache: "local" },
  options: { enableMenu: false, enableAssistiveMml: false },
  startup: { typeset: false, pageReady: startDeck },
};
