// RabbitMQ's RPC tutorial in Node, with amqplib: a server of one bare number; node_client.js is the client.
//
//     node foreign.js server URL QUEUE
//
// It prints JSON lines, as pika_server.py does.

"use strict";

const amqp = require("amqplib");

function fibonacci(n) {
  let [before, last] = [0, 1];
  for (let i = 0; i < n; i++) [before, last] = [last, before + last];
  return before;
}

async function serve(url, queue) {
  const connection = await amqp.connect(url);
  const channel = await connection.createChannel();
  await channel.assertQueue(queue, { durable: false });
  await channel.prefetch(1);
  await channel.consume(queue, (asked) => {
    const { replyTo, correlationId } = asked.properties;
    channel.sendToQueue(replyTo, Buffer.from(String(fibonacci(Number(asked.content)))), { correlationId });
    channel.ack(asked);
    console.log(JSON.stringify({ body: asked.content.toString() }));
  });
  console.log(JSON.stringify({ ready: true }));
}

setTimeout(() => process.exit(3), 20_000).unref(); // it ends by itself, whatever happens
serve(process.argv[3], process.argv[4]).catch((error) => {
  console.error(error);
  process.exit(1);
});
