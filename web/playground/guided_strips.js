/** <guided-strips>: pictures of guidance by a classifier and by CLIP, drawn when the site was built.
 * The attribute `only` leaves one of the two. */

import { choice, numberText } from './parts.js';
import { siteValue } from './studio.js';

const TEXTS = {
  classifier: {
    name: 'Classifier guidance',
    note: 'The unconditional model of chapter 02, guided by the gradient of the noisy classifier of chapter 03.',
  },
  clip: {
    name: 'CLIP guidance',
    note: 'The same model, guided by the gradient of the similarity to a text, of the noise-aware CLIP of chapter 04.',
  },
};

class GuidedStrips extends HTMLElement {
  async connectedCallback() {
    if (this.strips) return;
    try {
      this.strips = await siteValue('LECTURE26', 'strips', 'strips.js');
    } catch (error) {
      this.textContent = error.message;
      return;
    }
    const shown = Object.entries(TEXTS).filter(([kind]) => [null, kind].includes(this.getAttribute('only')));
    const asked = this.strips.classifier.rows.map(({ asked }) => asked);
    this.innerHTML = `
      <div class="stack">
        <fieldset><legend>What is asked for</legend><div class="choices">${asked.map((text, n) => choice('row', n, text, n === 0)).join('')}</div></fieldset>
        ${shown.map(([kind, { name, note }]) => `<section data-kind="${kind}"><h3>${name}</h3><p class="note">${note}</p><div class="tiles"></div></section>`).join('')}
        <p class="note">One seed, ${this.strips.steps} steps of DDIM. The gradients were computed with PyTorch, since a browser has no backward pass;
          ✓ and ✗ say whether the course’s reader reads what was asked for.</p>
      </div>`;
    this.addEventListener('change', () => this.show());
    this.show();
  }

  show() {
    const number = Number(this.querySelector('input[name=row]:checked').value);
    for (const section of this.querySelectorAll('section')) {
      const { scales, rows } = this.strips[section.dataset.kind];
      const { asked, images, right } = rows[number];
      section.querySelector('.tiles').style.setProperty('--columns', images.length);
      section.querySelector('.tiles').replaceChildren(
        ...images.map((source, n) => {
          const figure = document.createElement('figure');
          const picture = Object.assign(new Image(), { className: 'pixels', src: source, width: 32, height: 32 });
          picture.alt = `${asked} at scale ${scales[n]}: read ${right[n] ? 'right' : 'wrong'}`;
          const caption = document.createElement('figcaption');
          caption.textContent = `${right[n] ? '✓' : '✗'} scale ${numberText(scales[n])}`;
          figure.dataset.right = right[n];
          figure.append(picture, caption);
          return figure;
        }),
      );
    }
  }
}

customElements.define('guided-strips', GuidedStrips);
