// The official openai client for JavaScript: whole and streamed answers, cancelling, errors, models and embeddings.

import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";

const BASE = "SmolLM2-135M-Instruct";
const MODELS = [BASE, "french", "json", "pirate", "ticket"];
const messages = [{ role: "user", content: "Why was my card charged twice?" }];
const client = new OpenAI({ maxRetries: 0, timeout: 60_000 }); // the address comes from OPENAI_BASE_URL

const greedy = (model) => ({ model, messages, max_tokens: 40, temperature: 0 });

for (const model of MODELS) {
  test(`a stream is the whole answer [${model}]`, async () => {
    const whole = await client.chat.completions.create(greedy(model));
    const stream = await client.chat.completions.create({
      ...greedy(model), stream: true, stream_options: { include_usage: true },
    });
    const parts = [];
    for await (const part of stream) parts.push(part);
    const last = parts.pop();
    const [choice] = whole.choices;
    assert.equal(parts[0].choices[0].delta.role, "assistant");
    assert.equal(parts.map((part) => part.choices[0].delta.content ?? "").join(""), choice.message.content);
    assert.equal(parts.at(-1).choices[0].finish_reason, choice.finish_reason);
    assert.deepEqual(last.choices, []);
    assert.equal(last.usage.completion_tokens, whole.usage.completion_tokens);
    assert.equal(last.usage.prompt_tokens, whole.usage.prompt_tokens);
    if (model === "json") assert.ok(JSON.parse(choice.message.content).answer);
  });
}

test("the stream helper builds the final answer", async () => {
  const runner = client.chat.completions.stream({ ...greedy("pirate"), logprobs: true, top_logprobs: 2 });
  let text = "";
  runner.on("content", (delta) => { text += delta; });
  const final = await runner.finalChatCompletion();
  const whole = await client.chat.completions.create({ ...greedy("pirate"), logprobs: true, top_logprobs: 2 });
  assert.equal(text, whole.choices[0].message.content);
  assert.equal(final.choices[0].message.content, text);
  const tokens = ({ logprobs }) => logprobs.content.map(({ token }) => token);
  assert.deepEqual(tokens(final.choices[0]), tokens(whole.choices[0]));
});

test("several streams at once, with several choices each", async () => {
  const read = async (seed) => {
    const texts = ["", ""];
    const stream = await client.chat.completions.create({
      ...greedy(BASE), temperature: 1, seed, n: 2, max_tokens: 12, stream: true,
    });
    for await (const { choices: [choice] } of stream) texts[choice.index] += choice.delta.content ?? "";
    return texts;
  };
  const together = await Promise.all([1, 2, 3, 4].map(read));
  assert.equal(new Set(together.flat()).size, 8);
  assert.deepEqual(await read(3), together[2]);
});

test("completions, batched and streamed", async () => {
  const sent = { model: BASE, prompt: "The capital of France is", max_tokens: 8, temperature: 0 };
  const whole = await client.completions.create({ ...sent, prompt: [sent.prompt, "Two plus three is"], logprobs: 1 });
  assert.deepEqual(whole.choices.map(({ index }) => index), [0, 1]);
  assert.match(whole.choices[0].text, /Paris/);
  assert.equal(whole.choices[0].logprobs.tokens.join(""), whole.choices[0].text);
  let text = "";
  for await (const part of await client.completions.create({ ...sent, stream: true })) text += part.choices[0].text;
  assert.equal(text, whole.choices[0].text);
});

test("a stream can be left early", async () => {
  const stream = await client.chat.completions.create({ ...greedy(BASE), max_tokens: 1500, stream: true });
  let parts = 0;
  for await (const part of stream) {
    assert.ok(part.choices.length);
    parts += 1;
    if (parts === 5) stream.controller.abort();
  }
  assert.ok(parts < 1500);
});

test("a whole answer can be cancelled", async () => {
  const controller = new AbortController();
  const answer = client.chat.completions.create({ ...greedy(BASE), max_tokens: 1500 }, { signal: controller.signal });
  setTimeout(() => controller.abort(), 100);
  await assert.rejects(answer, OpenAI.APIUserAbortError);
});

test("the headers of an answer can be read", async () => {
  const { data, response, request_id: id } = await client.chat.completions.create(greedy("french")).withResponse();
  assert.ok(id);
  assert.ok(response.headers.get("x-ranklet-revision").startsWith(data.system_fingerprint.split("_").at(-1)));
});

test("models are listed", async () => {
  const listed = [];
  for await (const model of client.models.list()) listed.push(model.id);
  assert.deepEqual(listed.toSorted(), MODELS.toSorted());
  assert.equal((await client.models.retrieve("pirate")).object, "model");
});

test("embeddings", async () => {
  const { data } = await client.embeddings.create({ model: "french", input: ["one text", "another"] });
  assert.deepEqual(data.map(({ embedding }) => embedding.length), [576, 576]);
});

test("an unknown model is not found", async () => {
  await assert.rejects(client.chat.completions.create(greedy("frensh")), (error) => {
    assert.ok(error instanceof OpenAI.NotFoundError);
    assert.equal(error.code, "model_not_found");
    return true;
  });
});

test("a long prompt is a bad request, streamed or not", async () => {
  const long = { ...greedy(BASE), messages: [{ role: "user", content: "a word ".repeat(4000) }] };
  for (const stream of [false, true]) {
    await assert.rejects(client.chat.completions.create({ ...long, stream }), (error) => {
      assert.ok(error instanceof OpenAI.BadRequestError);
      assert.equal(error.code, "context_length_exceeded");
      return true;
    });
  }
});

const tools = [{ type: "function", function: { name: "now", parameters: { type: "object", properties: {} } } }];
test("a required tool is called, streamed or not", async () => {
  const asked = { ...greedy(BASE), tools, tool_choice: "required", parallel_tool_calls: false, max_tokens: 100 };
  const whole = (await client.chat.completions.create(asked)).choices[0];
  assert.equal(whole.finish_reason, "tool_calls");
  const streamed = await client.chat.completions.stream(asked).finalChatCompletion();
  const functions = ({ message }) => message.tool_calls.map(({ function: { name, arguments: given } }) => [name, given]);
  assert.deepEqual(functions(streamed.choices[0]), functions(whole));
  assert.equal(functions(whole)[0][0], "now");
});

for (const [name, value] of Object.entries({ functions: [{ name: "now" }], ebnf: 'root ::= "a"' })) {
  test(`refused_by_name[${name}]`, async () => {
    await assert.rejects(client.chat.completions.create({ ...greedy(BASE), [name]: value }), (error) => {
      assert.ok(error instanceof OpenAI.BadRequestError);
      assert.equal(error.param, name);
      return true;
    });
  });
}

test("refused_by_name[responses]", async () => {
  await assert.rejects(client.responses.create({ model: BASE, input: "Hello" }), (error) => {
    assert.ok(error instanceof OpenAI.NotFoundError);
    assert.match(error.message, /\/v1\/chat\/completions/);
    return true;
  });
});
