/** What a density and a cloud of points have in common, and where they differ. */

/** A density on a grid over [-reach, reach]^2, the values at the centres of the cells, of sum 1. */
export class GridDensity {
  /**
   * @param {(x: number, y: number) => number} logDensity up to a constant.
   * @param {number} reach
   * @param {number} size cells in each direction.
   */
  constructor(logDensity, reach, size) {
    Object.assign(this, { reach, size });
    this.centres = Float64Array.from({ length: size }, (_, i) => (2 * (i + 0.5) * reach) / size - reach);
    const logs = new Float64Array(size * size); // row by row, from the bottom
    for (let row = 0, at = 0; row < size; row++) {
      for (let column = 0; column < size; column++) {
        logs[at++] = logDensity(this.centres[column], this.centres[row]);
      }
    }
    const highest = logs.reduce((a, b) => Math.max(a, b), -Infinity);
    this.values = logs.map((log) => Math.exp(log - highest));
    const total = this.values.reduce((a, b) => a + b, 0);
    this.values = this.values.map((value) => value / total);
  }

  /** Whether more than a hundredth of it lies at the border, and so perhaps more beyond. */
  get isCut() {
    const isOuter = (i) => i === 0 || i === this.size - 1;
    const atBorder = (value, at) => (isOuter(at % this.size) || isOuter(Math.floor(at / this.size)) ? value : 0);
    return this.values.reduce((sum, value, at) => sum + atBorder(value, at), 0) > 0.01;
  }

  /** The distribution of the first coordinate, or of the second one (axis 1): one number for each column, or row. */
  marginal(axis = 0) {
    const sums = new Float64Array(this.size);
    this.values.forEach((value, at) => (sums[axis === 0 ? at % this.size : Math.floor(at / this.size)] += value));
    return sums;
  }

  /** The root of the mean variance of both coordinates. */
  spread() {
    let [sumX, sumY, squares] = [0, 0, 0];
    this.values.forEach((value, at) => {
      const [x, y] = [this.centres[at % this.size], this.centres[Math.floor(at / this.size)]];
      sumX += value * x;
      sumY += value * y;
      squares += value * (x * x + y * y);
    });
    return Math.sqrt(Math.max(0, squares - sumX ** 2 - sumY ** 2) / 2);
  }

  /** How much of it lies where something is true. */
  shareOf(isTrue) {
    return this.values.reduce((sum, value, at) => {
      const [x, y] = [this.centres[at % this.size], this.centres[Math.floor(at / this.size)]];
      return isTrue(x, y) ? sum + value : sum;
    }, 0);
  }

  /**
   * How far points (count, 2) would have to go, on average, to be spread as it is: the Wasserstein distance of each
   * coordinate's distribution, and of both the mean.
   */
  distanceFrom(points) {
    return (this.distanceAlong(points, 0) + this.distanceAlong(points, 1)) / 2;
  }

  distanceAlong(points, axis) {
    const values = points.filter((_, at) => at % 2 === axis).sort();
    const masses = this.marginal(axis);
    const width = (2 * this.reach) / this.size;
    let [cell, before, sum] = [0, 0, 0]; // before: the mass below the cell
    values.forEach((value, n) => {
      const mass = (n + 0.5) / values.length;
      while (cell < this.size - 1 && before + masses[cell] < mass) before += masses[cell++];
      const goal = cell * width - this.reach + (width * (mass - before)) / Math.max(masses[cell], Number.MIN_VALUE);
      sum += Math.abs(value - goal);
    });
    return sum / values.length;
  }

  /** The densities whose contours enclose these shares of the whole. */
  levels(shares) {
    const sorted = this.values.slice().sort().reverse();
    const levels = [];
    let inside = 0;
    for (const value of sorted) {
      inside += value;
      while (levels.length < shares.length && inside >= shares[levels.length]) levels.push(value);
    }
    return levels;
  }

  /** Segments [x1, y1, x2, y2] of the contour at a level. */
  contour(level) {
    const segments = [];
    for (let row = 0; row + 1 < this.size; row++) {
      for (let column = 0; column + 1 < this.size; column++) {
        const first = row * this.size + column;
        const corners = [first, first + 1, first + this.size + 1, first + this.size];
        const crossings = [];
        for (let i = 0; i < 4; i++) {
          const [a, b] = [corners[i], corners[(i + 1) % 4]];
          const [from, to] = [this.values[a], this.values[b]];
          if (from >= level === to >= level) continue;
          const share = (level - from) / (to - from);
          const between = (start, end) => this.centres[start] + share * (this.centres[end] - this.centres[start]);
          crossings.push(between(a % this.size, b % this.size), between(Math.floor(a / this.size), Math.floor(b / this.size)));
        }
        for (let i = 0; i + 3 < crossings.length; i += 4) segments.push(crossings.slice(i, i + 4));
      }
    }
    return segments;
  }
}

/** The root of the mean variance of both coordinates of points (count, 2). */
export function spreadOf(points) {
  const count = points.length / 2;
  let [sumX, sumY, squares] = [0, 0, 0];
  for (let at = 0; at < points.length; at += 2) {
    sumX += points[at];
    sumY += points[at + 1];
    squares += points[at] ** 2 + points[at + 1] ** 2;
  }
  return Math.sqrt(Math.max(0, squares / count - (sumX / count) ** 2 - (sumY / count) ** 2) / 2);
}

/** The share of points (count, 2) of which something is true. */
export function shareOf(points, isTrue) {
  let count = 0;
  for (let at = 0; at < points.length; at += 2) if (isTrue(points[at], points[at + 1])) count++;
  return count / (points.length / 2);
}

/** How many of the first coordinates of points (count, 2) lie in each of `bins` cells of [-reach, reach]. */
export function histogram(points, reach, bins) {
  const counts = new Float64Array(bins);
  for (let at = 0; at < points.length; at += 2) {
    const bin = Math.floor(((points[at] + reach) / (2 * reach)) * bins);
    if (bin >= 0 && bin < bins) counts[bin]++;
  }
  return counts;
}
