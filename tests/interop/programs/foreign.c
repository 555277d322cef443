/* RabbitMQ's RPC tutorial in C, with rabbitmq-c: a client and a server of one bare number.
 *
 *     foreign client URL QUEUE NUMBER [NUMBER ...]
 *     foreign server URL QUEUE
 *
 * It prints JSON lines, as pika_client.py and pika_server.py do. Build it with: cc foreign.c -lrabbitmq
 */

#include <amqp.h>
#include <amqp_tcp_socket.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void check(amqp_rpc_reply_t reply, const char *what) {
  if (reply.reply_type != AMQP_RESPONSE_NORMAL) {
    fprintf(stderr, "%s failed: %s\n", what, amqp_error_string2(reply.library_error));
    exit(1);
  }
}

static unsigned long long fibonacci(int n) {
  unsigned long long before = 0, last = 1;
  for (int i = 0; i < n; i++) {
    unsigned long long next = before + last;
    before = last;
    last = next;
  }
  return before;
}

static void print_escaped(const char *text) {
  for (; *text; text++) {
    if (*text == '"' || *text == '\\') putchar('\\');
    putchar(*text);
  }
}

int main(int count, char **arguments) {
  if (count < 4) return 2;
  const char *role = arguments[1];
  struct amqp_connection_info info;
  if (amqp_parse_url(arguments[2], &info) != AMQP_STATUS_OK) return 2;
  amqp_connection_state_t connection = amqp_new_connection();
  amqp_socket_t *socket = amqp_tcp_socket_new(connection);
  if (!socket || amqp_socket_open(socket, info.host, info.port)) return 3;
  check(amqp_login(connection, info.vhost, 0, 131072, 0, AMQP_SASL_METHOD_PLAIN, info.user, info.password), "login");
  amqp_channel_open(connection, 1);
  check(amqp_get_rpc_reply(connection), "opening a channel");

  int is_server = strcmp(role, "server") == 0;
  amqp_bytes_t name = is_server ? amqp_cstring_bytes(arguments[3]) : amqp_empty_bytes;
  amqp_queue_declare_ok_t *declared =
      amqp_queue_declare(connection, 1, name, 0, 0, !is_server, 0, amqp_empty_table);
  check(amqp_get_rpc_reply(connection), "declaring a queue");
  amqp_bytes_t own = amqp_bytes_malloc_dup(declared->queue);
  amqp_basic_consume(connection, 1, own, amqp_empty_bytes, 0, 1, 0, amqp_empty_table);
  check(amqp_get_rpc_reply(connection), "consuming");
  if (is_server) puts("{\"ready\":true}");
  fflush(stdout);

  for (int at = 4; is_server || at < count; at++) {
    amqp_basic_properties_t properties;
    memset(&properties, 0, sizeof properties);
    char id[32];
    snprintf(id, sizeof id, "c-%d", at);
    if (!is_server) {
      properties._flags = AMQP_BASIC_REPLY_TO_FLAG | AMQP_BASIC_CORRELATION_ID_FLAG;
      properties.reply_to = own;
      properties.correlation_id = amqp_cstring_bytes(id);
      amqp_basic_publish(connection, 1, amqp_empty_bytes, amqp_cstring_bytes(arguments[3]), 0, 0, &properties,
                         amqp_cstring_bytes(arguments[at]));
    }
    amqp_maybe_release_buffers(connection);
    amqp_envelope_t envelope;
    check(amqp_consume_message(connection, &envelope, NULL, 0), "waiting for a message");
    amqp_basic_properties_t *came = &envelope.message.properties;
    int size = (int)envelope.message.body.len;
    char *body = strndup(envelope.message.body.bytes, size);
    if (is_server) {
      char result[32];
      snprintf(result, sizeof result, "%llu", fibonacci(atoi(body)));
      properties._flags = AMQP_BASIC_CORRELATION_ID_FLAG;
      properties.correlation_id = came->correlation_id;
      amqp_basic_publish(connection, 1, amqp_empty_bytes, came->reply_to, 0, 0, &properties,
                         amqp_cstring_bytes(result));
      printf("{\"body\":\"%s\"}\n", body);
    } else {
      if (came->correlation_id.len != strlen(id) || memcmp(came->correlation_id.bytes, id, strlen(id)) != 0) return 4;
      printf("{\"sent\":\"%s\",\"reply\":\"", arguments[at]);
      print_escaped(body);
      puts("\"}");
    }
    fflush(stdout);
    free(body);
    amqp_destroy_envelope(&envelope);
  }
  amqp_connection_close(connection, AMQP_REPLY_SUCCESS);
  return 0;
}
