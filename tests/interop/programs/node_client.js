// The same plain client in Node: a bare number to a queue, replyTo and correlationId, nothing else.
//
//     node node_client.js URL QUEUE NUMBER [NUMBER ...]
//
// Sends all numbers at once, waits for all replies, and prints a JSON line for each, in the order of the numbers:
// {"sent":"30","reply":"832040"}.

"use strict";

const { randomUUID } = require("node:crypto");
const amqp = require("amqplib");

async function main(url, queue, numbers) {
  const connection = await amqp.connect(url);
  const channel = await connection.createChannel();
  const callback = await channel.assertQueue("", { exclusive: true });
  const waiting = new Map();
  await channel.consume(
    callback.queue,
    (message) => {
      const resolve = message && waiting.get(message.properties.correlationId);
      if (resolve) resolve(message.content.toString());
    },
    { noAck: true },
  );
  const replies = numbers.map((number) => {
    const correlationId = randomUUID();
    const reply = new Promise((resolve) => waiting.set(correlationId, resolve));
    channel.sendToQueue(queue, Buffer.from(number), { replyTo: callback.queue, correlationId });
    return reply;
  });
  for (const [index, reply] of replies.entries()) {
    console.log(JSON.stringify({ sent: numbers[index], reply: await reply }));
  }
  await connection.close();
}

setTimeout(() => process.exit(3), 20_000).unref(); // it ends by itself, whatever happens
const [url, queue, ...numbers] = process.argv.slice(2);
main(url, queue, numbers).catch((error) => {
  console.error(error);
  process.exit(1);
});
