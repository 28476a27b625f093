// Runs an ONNX model in onnxruntime-web (WebAssembly): node run_web.mjs REQUEST.json
// The request has the model's files and, for each run, its inputs by name: type, dims and little-endian bytes in base64.
import { readFileSync } from 'node:fs';
import * as ort from 'onnxruntime-web';

const ARRAYS = { float32: Float32Array, float16: Uint16Array, int64: BigInt64Array, int32: Int32Array };

const request = JSON.parse(readFileSync(process.argv[2], 'utf8'));
ort.env.wasm.numThreads = 1;
ort.env.logLevel = 'error';

const options = { executionProviders: ['wasm'], logSeverityLevel: 3 };
if (request.data) {
  options.externalData = [{ path: request.data.name, data: new Uint8Array(readFileSync(request.data.path)) }];
}
const session = await ort.InferenceSession.create(new Uint8Array(readFileSync(request.model)), options);

const results = [];
for (const run of request.runs) {
  const feeds = {};
  for (const [name, { type, dims, bytes }] of Object.entries(run)) {
    const raw = Uint8Array.from(Buffer.from(bytes, 'base64')); // a buffer of its own, which begins at 0
    feeds[name] = new ort.Tensor(type, new ARRAYS[type](raw.buffer), dims);
  }
  const outputs = await session.run(feeds, [request.output]);
  const { data, dims } = outputs[request.output];
  results.push({ dims, data: Array.from(data) });
}
console.log(JSON.stringify({ inputs: session.inputNames, results }));
