// Reads captions as the playground does: a list of them as JSON on stdin, what is read as JSON on stdout.
// tests/test_web_captions.py makes the list and compares.

import { readFileSync } from 'node:fs';
import { nextWords, parseCaption } from '../../web/playground/caption.js';

const captions = JSON.parse(readFileSync(0, 'utf8'));
const answers = captions.map((caption) => {
  const words = caption.split(' ');
  return { read: parseCaption(words), offered: [...words, null].map((_, n) => nextWords(words.slice(0, n))) };
});
console.log(JSON.stringify(answers));
