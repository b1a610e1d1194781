/** Checkpoints as they are in data/checkpoints: safetensors, in half or single precision. */

const HALVES = Float32Array.from({ length: 1 << 16 }, (_, bits) => halfToNumber(bits));

function halfToNumber(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

const READERS = {
  F16: { bytes: 2, read: (view, at) => HALVES[view.getUint16(at, true)] },
  F32: { bytes: 4, read: (view, at) => view.getFloat32(at, true) },
};

/**
 * Read a safetensors file.
 * @param {ArrayBuffer} buffer the file: 8 bytes with the length of a header in JSON, the header, the numbers.
 * @param {import('./memory.js').Memory} memory where the numbers go.
 * @returns {Object<string, {data: Float32Array, shape: number[]}>}
 * @throws {TypeError} if a tensor is of another type than F16 and F32.
 */
export function readSafetensors(buffer, memory) {
  const view = new DataView(buffer);
  const start = 8 + Number(view.getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, start - 8)));
  delete header.__metadata__;
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets: offsets }] of Object.entries(header)) {
    if (!(dtype in READERS)) throw new TypeError(`tensor ${name} must be F16 or F32; got ${dtype}`);
    const { bytes, read } = READERS[dtype];
    const data = memory.take((offsets[1] - offsets[0]) / bytes);
    for (let i = 0, at = start + offsets[0]; i < data.length; i++, at += bytes) data[i] = read(view, at);
    tensors[name] = { data, shape };
  }
  return tensors;
}

/** The bytes of a text in base64, as an ArrayBuffer. */
export function decodeBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text).buffer;
  const characters = atob(text);
  const bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return bytes.buffer;
}
