// Asks the service by Vercel's AI SDK: node ai_sdk.mjs TEXT_URL EMBEDDING_URL, or node ai_sdk.mjs TEXT_URL references
import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { embedMany, generateText, Output, stepCountIs, streamText, tool } from 'ai';
import { z } from 'zod';

const [textUrl, other] = process.argv.slice(2);
const own = (baseURL) => ({ name: 'service', baseURL, apiKey: 'none', supportsStructuredOutputs: true, includeUsage: true });
const compatible = createOpenAICompatible(own(textUrl));
const openai = createOpenAI(own(textUrl));
const asked = { system: 'Be brief.', prompt: 'Hello', maxRetries: 0 };
const notKept = { openai: { store: false }, service: { user: 'me' } };
const city = z.enum(['Rome', 'Paris']);
const weather = z.object({ city, is_warm: z.boolean() });
const tools = {
  get_weather: tool({
    description: 'The weather in a city.',
    inputSchema: z.object({ city }),
    execute: async (given) => `sunny in ${given.city}`,
  }),
};

async function streamed(model) {
  let text = '';
  const { textStream } = streamText({ ...asked, model, temperature: 0, maxOutputTokens: 8, onError: ({ error }) => { throw error; } });
  for await (const delta of textStream) text += delta;
  return text;
}

async function checked(model, completion, embedding) {
  const loop = await generateText({
    ...asked,
    model,
    tools,
    stopWhen: stepCountIs(2), // the call and its result go back, and the choice is free then
    prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber ? 'auto' : 'required' }),
  });
  const output = Output.object({ schema: weather });
  const first = await generateText({ ...asked, model, output, providerOptions: notKept });
  const history = [{ role: 'user', content: 'Hello' }, ...first.response.messages, { role: 'user', content: 'And now?' }];
  const second = await generateText({ model, messages: history, output, maxRetries: 0, providerOptions: notKept });
  return {
    whole: (await generateText({ ...asked, model, temperature: 0, maxOutputTokens: 8 })).text,
    streamed: await streamed(model),
    tools: loop.steps[0].toolResults.map((result) => result.output),
    answer: loop.text,
    forms: [first.output, second.output],
    completion: (await generateText({ model: completion, prompt: 'Hello', temperature: 0, maxOutputTokens: 8 })).text,
    embeddings: (await embedMany({ model: embedding, values: ['a', 'b c'] })).embeddings,
  };
}

async function references() {
  const model = openai('base');
  const first = await generateText({ ...asked, model, output: Output.object({ schema: weather }) });
  const messages = [{ role: 'user', content: 'Hello' }, ...first.response.messages, { role: 'user', content: 'And now?' }];
  try {
    await generateText({ model, messages, maxRetries: 0 });
    return { status: 200 };
  } catch (error) {
    return { status: error.statusCode, body: error.responseBody };
  }
}

async function all() {
  const embeddings = { compatible: createOpenAICompatible(own(other)), openai: createOpenAI(own(other)) };
  const effort = { openai: { reasoningEffort: 'low', forceReasoning: true } };
  const reasoned = await generateText({ ...asked, model: openai('base'), providerOptions: effort });
  return {
    compatible: await checked(compatible('base'), compatible.completionModel('base'), embeddings.compatible.embeddingModel('onnx')),
    responses: await checked(openai('base'), openai.completion('base'), embeddings.openai.embedding('onnx')),
    chat: await checked(openai.chat('base'), openai.completion('base'), embeddings.openai.embedding('onnx')),
    reasoned: reasoned.text,
  };
}

console.log(JSON.stringify(other === 'references' ? await references() : await all()));
