// RabbitMQ's RPC tutorial in Java, with RabbitMQ's own client: a client and a server of one bare number.
//
//     java -cp amqp-client.jar:slf4j-api.jar Foreign.java client URL QUEUE NUMBER [NUMBER ...]
//     java -cp amqp-client.jar:slf4j-api.jar Foreign.java server URL QUEUE
//
// It prints JSON lines, as pika_client.py and pika_server.py do.

import com.rabbitmq.client.AMQP;
import com.rabbitmq.client.Channel;
import com.rabbitmq.client.Connection;
import com.rabbitmq.client.ConnectionFactory;
import com.rabbitmq.client.DefaultConsumer;
import com.rabbitmq.client.Envelope;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.util.UUID;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.LinkedBlockingQueue;

public class Foreign {
  public static void main(String[] arguments) throws Exception {
    ConnectionFactory factory = new ConnectionFactory();
    factory.setUri(arguments[1]);
    Connection connection = factory.newConnection();
    Channel channel = connection.createChannel();
    if (arguments[0].equals("server")) {
      serve(channel, arguments[2]);
    } else {
      for (int at = 3; at < arguments.length; at++) {
        String reply = ask(channel, arguments[2], arguments[at]);
        System.out.println("{\"sent\":\"" + arguments[at] + "\",\"reply\":\"" + escape(reply) + "\"}");
      }
      connection.close();
    }
  }

  static void serve(Channel channel, String queue) throws IOException {
    channel.queueDeclare(queue, false, false, false, null);
    channel.basicQos(1);
    channel.basicConsume(queue, false, new DefaultConsumer(channel) {
      @Override
      public void handleDelivery(String tag, Envelope envelope, AMQP.BasicProperties asked, byte[] body)
          throws IOException {
        String text = new String(body, StandardCharsets.UTF_8);
        AMQP.BasicProperties properties =
            new AMQP.BasicProperties.Builder().correlationId(asked.getCorrelationId()).build();
        byte[] reply = String.valueOf(fibonacci(Integer.parseInt(text))).getBytes(StandardCharsets.UTF_8);
        channel.basicPublish("", asked.getReplyTo(), properties, reply);
        channel.basicAck(envelope.getDeliveryTag(), false);
        System.out.println("{\"body\":\"" + text + "\"}");
      }
    });
    System.out.println("{\"ready\":true}");
  }

  static String ask(Channel channel, String queue, String number) throws Exception {
    String own = channel.queueDeclare().getQueue();
    String id = UUID.randomUUID().toString();
    BlockingQueue<String> replies = new LinkedBlockingQueue<>();
    String tag = channel.basicConsume(own, true, new DefaultConsumer(channel) {
      @Override
      public void handleDelivery(String tag, Envelope envelope, AMQP.BasicProperties properties, byte[] body) {
        if (id.equals(properties.getCorrelationId())) {
          replies.add(new String(body, StandardCharsets.UTF_8));
        }
      }
    });
    AMQP.BasicProperties properties = new AMQP.BasicProperties.Builder().correlationId(id).replyTo(own).build();
    channel.basicPublish("", queue, properties, number.getBytes(StandardCharsets.UTF_8));
    String reply = replies.take();
    channel.basicCancel(tag);
    return reply;
  }

  static String escape(String text) {
    return text.replace("\\", "\\\\").replace("\"", "\\\"");
  }

  static long fibonacci(int n) {
    long before = 0;
    long last = 1;
    for (int i = 0; i < n; i++) {
      long next = before + last;
      before = last;
      last = next;
    }
    return before;
  }
}
