/** The sentences that the text-to-image model was trained with: what they say, and which word may come next. */

const SIZES = ['small', 'large'];
const COLOURS = ['red', 'orange', 'yellow', 'green', 'cyan', 'blue', 'purple', 'pink'];
const SHAPES = ['circle', 'square', 'triangle', 'star', 'ring', 'cross', 'heart', 'crescent'];
const BACKGROUNDS = ['dark', 'light', 'striped', 'checkered'];
const RELATIONS = ['left of', 'right of', 'above', 'below']; // as the readers number them
const PHRASES = ['to the left of', 'to the right of', 'above', 'below'];
const OPPOSITES = [1, 0, 3, 2];
const CANONICAL = [0, 2]; // "A left of B", not "B right of A"

const one = (words) => `(?:(${words.join('|')}) )`;
const NOUN = `a ${one(SIZES)}?${one(COLOURS)}?(${SHAPES.join('|')})`;
const CAPTION = new RegExp(`^${NOUN}(?: (${PHRASES.join('|')}) ${NOUN})?(?: on a (${BACKGROUNDS.join('|')}) background)?$`);

/**
 * What a caption asks for.
 * @param {string[]} words in lower case.
 * @returns {{reads: 'shapes' | 'scenes', wanted: Object<string, number>} | null} which reader can judge it, and
 *     for each of the labels that are named the number of its class, in the description that readers give (from
 *     the object on the left, or above); null for other sentences.
 */
export function parseCaption(words) {
  const match = CAPTION.exec(words.join(' '));
  if (!match) return null;
  const [size1, colour1, shape1, phrase, size2, colour2, shape2, background] = match.slice(1);
  const numbers = (entries) => {
    const named = entries.filter(([, , word]) => word !== undefined);
    return Object.fromEntries(named.map(([label, classes, word]) => [label, classes.indexOf(word)]));
  };
  const noun = (number, size, colour, shape) => [
    [`size${number}`, SIZES, size],
    [`colour${number}`, COLOURS, colour],
    [`shape${number}`, SHAPES, shape],
  ];
  const ground = ['background', BACKGROUNDS, background];
  if (!phrase) return { reads: 'shapes', wanted: numbers([...noun('', size1, colour1, shape1), ground]) };
  const relation = PHRASES.indexOf(phrase);
  const isCanonical = CANONICAL.includes(relation);
  const [first, second] = isCanonical ? ['_1', '_2'] : ['_2', '_1'];
  const nouns = [...noun(first, size1, colour1, shape1), ...noun(second, size2, colour2, shape2), ground];
  return { reads: 'scenes', wanted: { ...numbers(nouns), relation: isCanonical ? relation : OPPOSITES[relation] } };
}

/** Whether a reading (see Reader.read) has all that is wanted. */
export function isRight(reading, wanted) {
  return Object.entries(wanted).every(([label, number]) => reading[label].number === number);
}

/** A reading in words; of a scene, from the object on the left, or above. */
export function describe(reading) {
  const noun = (number) => ['size', 'colour', 'shape'].map((label) => reading[label + number]?.name).filter(Boolean).join(' ');
  const ground = reading.background ? ` on a ${reading.background.name} background` : '';
  if (!reading.relation) return `a ${noun('')}${ground}`;
  return `a ${noun('_1')} ${PHRASES[RELATIONS.indexOf(reading.relation.name)]} a ${noun('_2')}${ground}`;
}

/**
 * The words that may follow.
 * @param {string[]} words those before.
 * @returns {string[]} likely ones first; none where the caption is complete.
 */
export function nextWords(words) {
  const previous = words.at(-1);
  const count = words.filter((word) => SHAPES.includes(word)).length;
  const isGround = words.lastIndexOf('on') > Math.max(...SHAPES.map((shape) => words.lastIndexOf(shape)));
  if (previous === undefined) return ['a'];
  if (isGround) {
    if (previous === 'on') return ['a'];
    if (previous === 'a') return BACKGROUNDS;
    return BACKGROUNDS.includes(previous) ? ['background'] : [];
  }
  if (previous === 'a') return [...COLOURS, ...SHAPES, ...SIZES];
  if (SIZES.includes(previous)) return [...COLOURS, ...SHAPES];
  if (COLOURS.includes(previous)) return SHAPES;
  if (SHAPES.includes(previous)) return count < 2 ? ['on', 'to', 'above', 'below'] : ['on'];
  if (previous === 'to') return ['the'];
  if (previous === 'the') return ['left', 'right'];
  if (previous === 'left' || previous === 'right') return ['of'];
  return ['of', 'above', 'below'].includes(previous) ? ['a'] : [];
}
