/** What the pages need besides Sphinx's own scripts. */

// A browser lets no page read another one from a disk, so the search there does without excerpts.
if (location.protocol === 'file:' && typeof DOCUMENTATION_OPTIONS !== 'undefined') DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;

/** What is wider than its place scrolls, and so must be reached by the keyboard. */
function reachScrollers() {
  for (const box of document.querySelectorAll('pre, .table-wrapper, .equation, div.math, mjx-container[display=true]')) {
    if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
    else box.removeAttribute('tabindex');
  }
}

/** On paper everything is open. */
function openAll() {
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

addEventListener('load', reachScrollers);
addEventListener('resize', reachScrollers);
addEventListener('toggle', reachScrollers, true);
addEventListener('beforeprint', openAll);
addEventListener('afterprint', closeAgain);
