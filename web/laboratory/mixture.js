/** A mixture of round normals in the plane, of which every noisy score is known exactly (chapters 01 and 05). */

/**
 * One component of the data.
 * @typedef {{weight: number, x: number, y: number, std: number, label: number}} Component
 *     label: the class that it belongs to. Weights need not sum to 1.
 */

/** A density of the plane at every noise level: some components, perhaps blurred. */
export class Mixture {
  /**
   * @param {Component[]} components at least one.
   * @param {number} blur standard deviation of noise that is added to the data before all else.
   */
  constructor(components, blur = 0) {
    const total = components.reduce((sum, component) => sum + component.weight, 0);
    this.parts = components.map(({ weight, x, y, std }) => {
      return { logWeight: Math.log(weight / total), x, y, variance: std ** 2 + blur ** 2 };
    });
    this.levels = new Map(); // what the components are at the noise levels that were asked for
    this.gradient = [0, 0];
  }

  /** The components at a noise level: centre, variance v, and the log of what stands in front of the exponential. */
  noisyParts(alphaBar) {
    const signal = Math.sqrt(alphaBar);
    return this.parts.map(({ logWeight, x, y, variance }) => {
      // pi_k N(x_t; sqrt(alpha_bar) mu_k, (alpha_bar s_k^2 + 1 - alpha_bar) I)
      const v = alphaBar * variance + 1 - alphaBar;
      return { x: signal * x, y: signal * y, v, logFactor: logWeight - Math.log(2 * Math.PI * v), log: 0 };
    });
  }

  /**
   * log q(x_t), in nats; the score, its gradient, is left in `gradient`.
   * @param {number} x
   * @param {number} y
   * @param {number} alphaBar the signal that is left; 1 for the data themselves.
   */
  at(x, y, alphaBar) {
    let parts = this.levels.get(alphaBar);
    if (!parts) this.levels.set(alphaBar, (parts = this.noisyParts(alphaBar)));
    let highest = -Infinity;
    for (const part of parts) {
      part.log = part.logFactor - ((x - part.x) ** 2 + (y - part.y) ** 2) / (2 * part.v);
      if (part.log > highest) highest = part.log;
    }
    let total = 0;
    let right = 0;
    let up = 0;
    for (const part of parts) {
      const share = Math.exp(part.log - highest);
      total += share;
      right += (share * (part.x - x)) / part.v;
      up += (share * (part.y - y)) / part.v;
    }
    this.gradient[0] = right / total;
    this.gradient[1] = up / total;
    return highest + Math.log(total);
  }
}

/** What guidance needs of the data: the densities of one class, of the other one, of all, and a weaker model's. */
export class Densities {
  /**
   * @param {Component[]} components with at least one of the label.
   * @param {number} label the class that is asked for.
   * @param {number} blur by which the weaker model's data are blurred.
   */
  constructor(components, label, blur) {
    const own = components.filter((component) => component.label === label);
    const others = components.filter((component) => component.label !== label);
    this.own = new Mixture(own);
    this.others = new Mixture(others.length ? others : own);
    this.all = new Mixture(components);
    this.weak = new Mixture(own, blur);
    const weightOf = (list) => list.reduce((sum, component) => sum + component.weight, 0);
    this.logPrior = Math.log(weightOf(own) / weightOf(components));
  }

  /** log p(y | x_t) of the class that is asked for: the exact noisy classifier. */
  logClass(x, y, alphaBar) {
    return this.logPrior + this.own.at(x, y, alphaBar) - this.all.at(x, y, alphaBar);
  }

  /** Whether a clean point's likeliest class is the one that is asked for. */
  isInClass(x, y) {
    return this.logClass(x, y, 1) > Math.log(0.5);
  }
}
