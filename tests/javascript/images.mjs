// Greedy tokens about an image, by transformers.js alone: node images.mjs REQUEST, where the request is JSON with `model` (an
// export directory), `class` (of transformers.js), options of generate(), and either `text` and `image` (a file) for the
// processor of transformers.js, or `ids`, `pixels` and `dims`.
import { basename, dirname } from 'node:path';
import * as transformers from '@huggingface/transformers';

const { model: directory, class: name, text, image, ids, pixels, dims, options } = JSON.parse(process.argv[2]);
const { env, AutoProcessor, Tensor, load_image } = transformers;
env.allowRemoteModels = false;
env.localModelPath = dirname(directory);

const source = basename(directory);
const model = await transformers[name].from_pretrained(source, { subfolder: '', dtype: 'fp32', device: 'cpu' });
let inputs;
if (ids) {
    inputs = {
        input_ids: new Tensor('int64', ids.map(BigInt), [1, ids.length]),
        attention_mask: new Tensor('int64', ids.map(() => 1n), [1, ids.length]),
        pixel_values: new Tensor('float32', pixels, dims),
    };
} else {
    const processor = await AutoProcessor.from_pretrained(source);
    inputs = await processor(text, [await load_image(image)]);
}
const tokens = await model.generate({ ...inputs, do_sample: false, ...options });
console.log(JSON.stringify(tokens.tolist().map((row) => row.map(Number))[0].slice(inputs.input_ids.dims[1])));
