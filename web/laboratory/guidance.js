/**
 * The ways to guide, each as the score that it follows: base + w push.
 *
 * w is the weight of Ho and Salimans: at -1 nothing is asked for, at 0 nothing is guided. The gradient of a
 * classifier counts s = 1 + w times on top of the unconditional score, so that 0 is Bayes' rule in all of them.
 */

/**
 * @typedef {{
 *   name: string, formula: string, note: string,
 *   score: (densities, x, y, alphaBar, out: {base: number[], push: number[]}) => void,
 *   logRatio: (densities, x, y) => number, other: string
 * }} Way
 *     score: writes both parts at a point; logRatio: log of what the data's density is multiplied by, to the
 *     power w, in the tilted density; up to a constant.
 */

function subtract(out, from) {
  out.push[0] -= from[0];
  out.push[1] -= from[1];
}

/** base = push = the score of the class that is asked for. */
function ownScore({ own }, x, y, alphaBar, out) {
  own.at(x, y, alphaBar);
  for (let i = 0; i < 2; i++) out.base[i] = out.push[i] = own.gradient[i];
}

/** A way that pushes from another density to that of the class. */
function awayFrom(name, other, texts) {
  return {
    name,
    ...texts,
    score(densities, x, y, alphaBar, out) {
      ownScore(densities, x, y, alphaBar, out);
      densities[other].at(x, y, alphaBar);
      subtract(out, densities[other].gradient);
    },
    logRatio: (densities, x, y) => densities.own.at(x, y, 1) - densities[other].at(x, y, 1),
    other,
  };
}

/** A classifier's gradient; a clean one knows only data without noise, and takes x_t for such. */
function byClassifier(name, isClean, texts) {
  return {
    name,
    ...texts,
    score({ own, all }, x, y, alphaBar, out) {
      // g = grad log p(y | x_t) = grad log q(x_t | y) - grad log q(x_t)
      const level = isClean ? 1 : alphaBar;
      own.at(x, y, level);
      for (let i = 0; i < 2; i++) out.push[i] = own.gradient[i];
      all.at(x, y, level);
      subtract(out, all.gradient);
      // (1 + w) g on top of the unconditional score
      all.at(x, y, alphaBar);
      out.base[0] = all.gradient[0] + out.push[0];
      out.base[1] = all.gradient[1] + out.push[1];
    },
    logRatio: (densities, x, y) => densities.logClass(x, y, 1),
    other: 'all',
  };
}

export const WAYS = {
  conditional: {
    name: 'Conditional model',
    formula: '∇log q(x<sub>t</sub> | y)',
    note: 'Not guided: what w = 0 is everywhere else.',
    score(densities, x, y, alphaBar, out) {
      ownScore(densities, x, y, alphaBar, out);
      out.push.fill(0);
    },
    logRatio: () => 0,
    other: 'own',
  },
  classifier: byClassifier('Classifier guidance', false, {
    formula: '∇log q(x<sub>t</sub>) + (1 + w) ∇log p(y | x<sub>t</sub>)',
    note: 'An exact classifier of noisy points: the same as classifier-free guidance, arrow by arrow.',
  }),
  cleanClassifier: byClassifier('Classifier guidance', true, {
    formula: '∇log q(x<sub>t</sub>) + (1 + w) ∇log p(y | x<sub>0</sub> = x<sub>t</sub>)',
    note: 'A classifier that knows clean points only: far from the data it is sure, and wrong.',
  }),
  free: awayFrom('Classifier-free guidance', 'all', {
    formula: '(1 + w) ∇log q(x<sub>t</sub> | y) − w ∇log q(x<sub>t</sub>)',
    note: 'Away from what the model draws when nothing is said.',
  }),
  negative: awayFrom('Negative prompt', 'others', {
    formula: '(1 + w) ∇log q(x<sub>t</sub> | y) − w ∇log q(x<sub>t</sub> | not y)',
    note: 'Away from the other class alone: it pushes farther.',
  }),
  auto: awayFrom('Autoguidance', 'weak', {
    formula: '(1 + w) ∇log q(x<sub>t</sub> | y) − w ∇log q<sub>weak</sub>(x<sub>t</sub> | y)',
    note: 'Away from a weaker model of the same class, whose data are blurred.',
  }),
};

/**
 * Whether the tilted density q(x | y) ratio(x)^w can be normalised: far out the widest component of each density
 * decides, and the sum of the precisions must be above 0.
 */
export function canBeNormalised(way, densities, w) {
  const precision = (mixture) => 1 / Math.max(...mixture.parts.map((part) => part.variance));
  return (1 + w) * precision(densities.own) - w * precision(densities[way.other]) > 0;
}

/** log of the tilted density at a point, up to a constant. */
export function logTilted(way, densities, w, x, y) {
  return densities.own.at(x, y, 1) + w * way.logRatio(densities, x, y);
}
