/** What the pages need besides Sphinx's own scripts. */

// A browser lets no page read another one from a disk, so the search there does without excerpts.
if (location.protocol === 'file:' && typeof DOCUMENTATION_OPTIONS !== 'undefined') DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;

const FORMULAS_AT_ONCE = 6; // some 30 ms of work: nobody waits for a page that sets formulas
const whenIdle = () => new Promise((resolve) => (globalThis.requestIdleCallback ?? setTimeout)(resolve));

/**
 * MathJax sets the formulas near the screen. This sets all others while the page has nothing else to do, so that
 * none is blank when it is scrolled to.
 */
async function setFormulas() {
  if (!globalThis.MathJax?.startup) return;
  await MathJax.startup.promise;
  const math = MathJax.startup.document;
  for (;;) {
    const waiting = [...document.querySelectorAll('mjx-lazy')].slice(0, FORMULAS_AT_ONCE);
    if (!waiting.length) break;
    await whenIdle();
    math.lazyObserve(waiting.map((target) => ({ target, isIntersecting: true })));
    await whenIdle(); // MathJax takes them up when idle as well, and was there first
    await math.lazyPromise;
  }
  noteWidths();
  reachScrollers();
  dispatchEvent(new Event('formulas-set'));
}

/** The style for paper makes formulas small that would not fit, and has to know how wide they are. */
function noteWidths() {
  for (const formula of document.querySelectorAll('mjx-container[display=true]')) {
    const drawn = formula.querySelector('svg');
    const width = drawn?.style.minWidth || drawn?.getAttribute('width'); // of a numbered one, or of one without a number
    if (width?.endsWith('ex')) formula.style.setProperty('--width-in-ex', parseFloat(width));
  }
}

/** What is wider than its place scrolls, and so must be reached by the keyboard. */
function reachScrollers() {
  const boxes = [...document.querySelectorAll('pre, .table-wrapper, .equation, div.math, mjx-container[display=true]')];
  const areWide = boxes.map((box) => box.scrollWidth > box.clientWidth + 1); // all are measured before one is changed
  boxes.forEach((box, index) => (areWide[index] ? box.setAttribute('tabindex', '0') : box.removeAttribute('tabindex')));
}

/**
 * A link into a page leads to its target, wherever that moves while what is above it gets its height: until all
 * formulas are set, or the reader goes elsewhere.
 */
function keepTarget() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const article = document.querySelector('article');
  if (!target || !article) return;
  const observer = new ResizeObserver(() => target.scrollIntoView({ behavior: 'instant' }));
  const stop = () => observer.disconnect();
  for (const event of ['wheel', 'touchstart', 'pointerdown', 'keydown', 'formulas-set']) addEventListener(event, stop, { once: true });
  observer.observe(article);
}

/** On paper everything is open. */
function openAll() {
  noteWidths();
  for (const details of document.querySelectorAll('article details:not([open])')) {
    details.open = true;
    details.dataset.wasClosed = '';
  }
}

function closeAgain() {
  for (const details of document.querySelectorAll('details[data-was-closed]')) {
    details.open = false;
    delete details.dataset.wasClosed;
  }
}

// who comes back, or loads anew, is where he was
if (performance.getEntriesByType('navigation')[0]?.type === 'navigate') keepTarget();
addEventListener('hashchange', keepTarget);
addEventListener('load', () => whenIdle().then(reachScrollers).then(setFormulas));
addEventListener('resize', reachScrollers);
addEventListener('toggle', reachScrollers, true);
addEventListener('beforeprint', openAll);
addEventListener('afterprint', closeAgain);
