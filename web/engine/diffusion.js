/** The schedule and DDIM (chapter 01), and classifier-free guidance (chapter 05). */

/** Betas of a squared cosine, T of them. */
export function cosineBetas(numSteps) {
  const alphaBar = (u) => Math.cos((((u + 0.008) / 1.008) * Math.PI) / 2) ** 2;
  return Array.from({ length: numSteps }, (_, t) =>
    Math.min(1 - alphaBar((t + 1) / numSteps) / alphaBar(t / numSteps), 0.999),
  );
}

/** Betas that grow linearly, T of them, at least 21. */
export function linearBetas(numSteps) {
  const factor = 1000 / numSteps;
  return Array.from({ length: numSteps }, (_, t) => factor * (1e-4 + ((0.02 - 1e-4) * t) / (numSteps - 1)));
}

export const SCHEDULES = { cosine: cosineBetas, linear: linearBetas };

/** A noise schedule, perhaps respaced. Steps are counted from 0, as in the course's code. */
export class Schedule {
  /**
   * @param {number[]} alphaBar the signal that is left at each step.
   * @param {number[]} steps the step of the original schedule that each one stands for.
   */
  constructor(alphaBar, steps) {
    Object.assign(this, { alphaBar, steps });
  }

  /** The whole schedule of betas. */
  static fromBetas(betas) {
    let kept = 1;
    return new Schedule(
      betas.map((beta) => (kept *= 1 - beta)),
      betas.map((_, t) => t),
    );
  }

  get numSteps() {
    return this.alphaBar.length;
  }

  /** alpha_bar at the step before, which is 1 before the first. */
  alphaBarPrev(step) {
    return step > 0 ? this.alphaBar[step - 1] : 1;
  }

  /** A schedule that visits numSteps of this one's steps, evenly spread, the first and the last included. */
  respace(numSteps) {
    const kept = linspace(0, this.numSteps - 1, numSteps).map(roundHalfToEven);
    return new Schedule(
      kept.map((step) => this.alphaBar[step]),
      kept.map((step) => this.steps[step]),
    );
  }
}

/** Evenly spread numbers, counted from both ends as PyTorch does, so that they round to the same steps. */
function linspace(start, end, count) {
  const gap = (end - start) / (count - 1);
  const half = Math.floor(count / 2);
  return Array.from({ length: count }, (_, i) => (i < half ? start + gap * i : end - gap * (count - 1 - i)));
}

/** The nearest whole number; of two equally near ones the even one, as in Python and PyTorch. */
export function roundHalfToEven(x) {
  const below = Math.floor(x);
  if (x - below !== 0.5) return Math.round(x);
  return below % 2 === 0 ? below : below + 1;
}

/** (1 + w) v_c - w v_u: -1 is the unconditional prediction, 0 the conditional one, above 0 guided. */
export function cfgCombine(cond, uncond, w) {
  return cond.map((value, i) => (1 + w) * value - w * uncond[i]);
}

/** x_0 = sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v, clipped to [-1, 1] if told so. */
export function x0FromV(x, v, alphaBar, clip) {
  const [signal, noise] = [Math.sqrt(alphaBar), Math.sqrt(1 - alphaBar)];
  return x.map((value, i) => {
    const clean = signal * value - noise * v[i];
    return clip ? Math.max(-1, Math.min(1, clean)) : clean;
  });
}

/** x_{t-1} of DDIM from x_t and the predicted x_0. */
export function ddimStep(x, clean, alphaBar, alphaBarPrev) {
  const [signal, noise] = [Math.sqrt(alphaBar), Math.sqrt(1 - alphaBar)];
  const [signalPrev, noisePrev] = [Math.sqrt(alphaBarPrev), Math.sqrt(1 - alphaBarPrev)];
  // eps = (x_t - sqrt(alpha_bar) x_0) / sqrt(1 - alpha_bar)
  return x.map((value, i) => signalPrev * clean[i] + (noisePrev * (value - signal * clean[i])) / noise);
}

/** x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps. */
export function qSample(clean, alphaBar, eps) {
  const [signal, noise] = [Math.sqrt(alphaBar), Math.sqrt(1 - alphaBar)];
  return clean.map((value, i) => signal * value + noise * eps[i]);
}
