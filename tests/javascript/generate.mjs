// Greedy tokens of an export, by transformers.js alone: node generate.mjs REQUEST, where the request is JSON with
// `model` (an export directory), `class` (of transformers.js), `texts` or `features`, and options of generate().
import { basename, dirname } from 'node:path';
import * as transformers from '@huggingface/transformers';

const { model: directory, class: name, texts, features, options } = JSON.parse(process.argv[2]);
const { env, AutoTokenizer, Tensor } = transformers;
env.allowRemoteModels = false;
env.localModelPath = dirname(directory);

const source = basename(directory);
const model = await transformers[name].from_pretrained(source, { subfolder: '', dtype: 'fp32', device: 'cpu' });
let inputs;
if (texts) {
    const tokenizer = await AutoTokenizer.from_pretrained(source);
    const { input_ids, attention_mask } = tokenizer(texts, { padding: true });
    inputs = { inputs: input_ids, attention_mask };
} else {
    inputs = { inputs: new Tensor('float32', features.flat(2), [features.length, features[0].length, features[0][0].length]) };
}
const tokens = await model.generate({ ...inputs, do_sample: false, ...options });
console.log(JSON.stringify(tokens.tolist().map((row) => row.map(Number))));
