/** A text field that offers the words which may come next (the combobox pattern of ARIA). */

import { nextWords } from './caption.js';

export class WordField {
  /**
   * @param {HTMLInputElement} input with a list of words beside it, the element that aria-controls names.
   * @param {() => void} onChange is called when the text has changed.
   */
  constructor(input, onChange) {
    Object.assign(this, { input, onChange, chosen: -1 });
    this.list = input.parentElement.querySelector('[role=listbox]');
    input.addEventListener('input', () => this.offer());
    input.addEventListener('focus', () => this.offer());
    input.addEventListener('blur', () => this.close());
    input.addEventListener('keydown', (event) => this.onKey(event));
    this.list.addEventListener('mousedown', (event) => event.preventDefault()); // the field keeps the focus
    this.list.addEventListener('click', (event) => {
      const option = event.target.closest('[role=option]');
      if (option) this.take(option.textContent);
    });
  }

  /** The words before the one that is being typed, and what there is of that. */
  parts() {
    const words = this.input.value.toLowerCase().split(/\s+/);
    const typed = words.pop();
    return { words: words.filter(Boolean), typed };
  }

  offer() {
    const { words, typed } = this.parts();
    const fitting = nextWords(words).filter((word) => word.startsWith(typed) && word !== typed);
    this.chosen = -1;
    this.list.replaceChildren(
      ...fitting.map((word, n) => {
        const option = document.createElement('li');
        option.id = `${this.list.id}-${n}`;
        option.setAttribute('role', 'option');
        option.setAttribute('aria-selected', 'false');
        option.textContent = word;
        return option;
      }),
    );
    this.show(fitting.length > 0);
  }

  show(isOpen) {
    this.list.hidden = !isOpen;
    this.input.setAttribute('aria-expanded', isOpen);
    if (!isOpen) this.input.removeAttribute('aria-activedescendant');
  }

  close() {
    this.show(false);
  }

  onKey(event) {
    const options = [...this.list.children];
    const isOpen = !this.list.hidden && options.length > 0;
    if (event.key === 'Escape') this.close();
    else if (isOpen && (event.key === 'ArrowDown' || event.key === 'ArrowUp')) {
      const step = event.key === 'ArrowDown' ? 1 : -1;
      this.chosen = (this.chosen + step + options.length + (this.chosen < 0 && step < 0 ? 1 : 0)) % options.length;
      options.forEach((option, n) => option.setAttribute('aria-selected', n === this.chosen));
      this.input.setAttribute('aria-activedescendant', options[this.chosen].id);
      event.preventDefault();
    } else if (event.key === 'Enter') {
      if (isOpen && this.chosen >= 0) this.take(options[this.chosen].textContent);
      else {
        this.close();
        this.onChange();
      }
      event.preventDefault();
    }
  }

  /** Put a word in the place of what has been typed of it. */
  take(word) {
    const { words } = this.parts();
    this.input.value = `${[...words, word].join(' ')} `;
    this.input.focus();
    this.offer();
  }
}
