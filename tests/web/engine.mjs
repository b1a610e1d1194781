// Runs the browser's networks in node: a job as JSON on stdin, what they compute as JSON on stdout.
// tests/test_web_engine.py makes the job and compares with PyTorch.

import { readFileSync } from 'node:fs';
import { Schedule, cosineBetas } from '../../web/engine/diffusion.js';
import { ClassModel, TextModel, keepPixels } from '../../web/engine/models.js';

const job = JSON.parse(readFileSync(0, 'utf8'));
const floats = (rows) => rows.map((row) => Float32Array.from(row));
const last = (steps) => [...steps].at(-1).after;

function checkpoint(name) {
  const bytes = readFileSync(`${job.folder}/${name}.safetensors`);
  const settings = JSON.parse(readFileSync(`${job.folder}/${name}.json`, 'utf8')).settings;
  return { settings, buffer: bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length) };
}

function classModel(options) {
  return new ClassModel(
    { denoiser: checkpoint('conditional_ddpm_shapes32'), reader: checkpoint('reader_shapes32') },
    options,
  );
}

function classCases(model, { x, labels, t, noise, wishes }) {
  return {
    isFast: model.memory.kernel !== null,
    outputs: model.unet.predict(floats(x), t, { labels }),
    read: model.reader.logits(floats(x)),
    drawn: wishes.map((wish) => last(model.draw({ ...wish, noise: floats(noise) }))),
  };
}

function textCases({ z, rows, t, image, images, prompt, ws, steps, strength, unknown, shapesImage }) {
  const model = new TextModel({
    denoiser: checkpoint('text_to_image_shapes64'),
    vae: checkpoint('vae_shapes64'),
    shapesReader: checkpoint('reader_shapes64'),
    scenesReader: checkpoint('reader_scenes64'),
  });
  const text = model.textEncoder.encode(rows);
  const maps = {}; // the mean over layers and heads, of the maps of each side, of the first image
  const look = (weights, side, b, head) => {
    if (b > 0) return;
    maps[side] ??= { sum: new Float64Array(weights.length), count: 0 };
    weights.forEach((weight, i) => (maps[side].sum[i] += weight));
    maps[side].count++;
  };
  const wish = { prompt, ws, noise: floats(z), steps };
  const picture = Float32Array.from(image);
  const flags = Uint8Array.from(unknown);
  const { data, channels, columns } = text.features;
  return {
    context: Array.from({ length: channels }, (_, c) => data.slice(c * columns, c * columns + text.mask.length)),
    mask: text.mask,
    outputs: model.unet.predict(floats(z), t, { text, look }),
    maps: Object.fromEntries(Object.entries(maps).map(([side, { sum, count }]) => [side, sum.map((s) => s / count)])),
    decoded: model.decode(floats(z)),
    encoded: model.encode(floats(images)),
    drawn: model.decode(last(model.draw(wish))),
    again: model.decode(last(model.imageToImage({ ...wish, image: picture, strength }))),
    inpainted: model
      .decode(last(model.inpaint({ ...wish, image: picture, unknown: flags })))
      .map((drawn) => keepPixels(drawn, picture, flags)),
    read: { shapes: model.shapesReader.logits(floats(images)), scenes: model.scenesReader.logits(floats(images)) },
  };
}

function schedules(counts) {
  const whole = Schedule.fromBetas(cosineBetas(1000));
  return counts.map((count) => whole.respace(count)).map(({ alphaBar, steps }) => ({ alphaBar, steps }));
}

const results = {
  fast: classCases(classModel(), job.class),
  plain: classCases(classModel({ simd: false }), { ...job.class, wishes: [] }),
  text: textCases(job.text),
  schedules: schedules(job.counts),
};
process.stdout.write(JSON.stringify(results, (_, value) => (ArrayBuffer.isView(value) ? Array.from(value) : value)));
