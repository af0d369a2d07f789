// openai-node: chats, streams, tools, parse helpers, errors. Run as `node SCRIPT BASE_URL MODEL FOLDER WORK`.
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import OpenAI, { BadRequestError, NotFoundError } from 'openai';
import { zodFunction, zodResponseFormat } from 'openai/helpers/zod';
import { z } from 'zod';

const [baseUrl, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${baseUrl}/v1`, apiKey: 'none', maxRetries: 0 });
const ask = { model, messages: [{ role: 'user', content: 'What is the capital of France?' }], temperature: 0 };
const City = z.object({ name: z.string().max(30), population: z.number().int().min(0).max(100000000) });
const Weather = z.object({ city: z.enum(['Paris', 'Rome']), days: z.number().int().min(1).max(9) });

const steps = {
  async models() {
    const found = [];
    for await (const each of client.models.list()) found.push(each.id);
    assert.deepEqual(found, [model]);
  },
  async chat() {
    const answer = await client.chat.completions.create(ask);
    assert.match(answer.choices[0].message.content, /Paris/);
    assert.ok(answer._request_id);
  },
  async stream() {
    const whole = await client.chat.completions.create(ask);
    let text = '', usage = null;
    for await (const part of await client.chat.completions.create({ ...ask, stream: true, stream_options: { include_usage: true } })) {
      text += part.choices[0]?.delta?.content ?? '';
      usage = part.usage ?? usage;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
  },
  async 'stream helper'() {
    let text = '';
    const runner = client.chat.completions.stream(ask).on('content', (delta) => { text += delta; });
    assert.equal(await runner.finalContent(), text);
  },
  async 'leaving a stream'() {
    const stream = await client.chat.completions.create({ ...ask, stream: true });
    for await (const part of stream) { assert.ok(part.id); break; }
    stream.controller.abort();
  },
  async completion() {
    const answer = await client.completions.create({ model, prompt: ['One, two,', 'Red, green,'], max_tokens: 4, temperature: 0 });
    assert.equal(answer.choices.length, 2);
  },
  async tools() {
    const tools = [zodFunction({ name: 'get_weather', parameters: Weather })];
    const answer = await client.chat.completions.parse({ ...ask, tools, tool_choice: 'required', parallel_tool_calls: false });
    Weather.parse(answer.choices[0].message.tool_calls[0].function.parsed_arguments);
    const runner = client.chat.completions.stream({ ...ask, tools, tool_choice: 'required', parallel_tool_calls: false });
    const final = await runner.finalChatCompletion();
    assert.equal(final.choices[0].message.tool_calls[0].function.arguments, answer.choices[0].message.tool_calls[0].function.arguments);
  },
  async 'run tools'() {
    const asked = [];
    const tool = {
      type: 'function',
      function: {
        name: 'get_weather', parse: JSON.parse, parameters: zodFunction({ name: 'x', parameters: Weather }).function.parameters,
        function: (given) => { asked.push(Weather.parse(given)); return 'sunny'; },
      },
    };
    const choice = { type: 'function', function: { name: 'get_weather' } };
    const runner = client.chat.completions.runTools({ ...ask, tools: [tool], tool_choice: choice });
    await runner.finalChatCompletion();
    assert.equal(asked.length, 1);
  },
  async parse() {
    const answer = await client.chat.completions.parse({ ...ask, response_format: zodResponseFormat(City, 'city') });
    City.parse(answer.choices[0].message.parsed);
  },
  async logprobs() {
    const answer = await client.chat.completions.create({ ...ask, logprobs: true, top_logprobs: 2 });
    assert.equal(answer.choices[0].logprobs.content[0].top_logprobs.length, 2);
  },
  async 'n and seed'() {
    const texts = async (seed) => (await client.chat.completions.create({ ...ask, temperature: 1, n: 2, seed, max_tokens: 12 })).choices.map((c) => c.message.content);
    assert.deepEqual(await texts(1), await texts(1));
  },
  async errors() {
    await assert.rejects(client.chat.completions.create({ ...ask, model: 'other' }), NotFoundError);
    await assert.rejects(client.chat.completions.create({ ...ask, n: 'two' }), BadRequestError);
    await assert.rejects(client.embeddings.create({ model, input: 'x' }), NotFoundError);
  },
};

console.log(`version openai ${JSON.parse(readFileSync(new URL('./node_modules/openai/package.json', import.meta.url))).version}`);
let failed = false;
for (const [name, step] of Object.entries(steps)) {
  try {
    await step();
    console.log(`ok ${name}`);
  } catch (error) {
    failed = true;
    console.log(`FAILED ${name}\n${error.stack}`);
  }
}
process.exit(failed ? 1 : 0);
